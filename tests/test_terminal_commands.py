"""Long commands on a real terminal of 80 columns: what moves, what stays, and Ctrl-C.

Each runs forked, held after its second piece, so that its rows can be looked at.
"""

import re
from dataclasses import dataclass

import pytest
from commands import invoke, write_rows
from fakes import make_cache, make_traces
from forked import CACHE_TEACHER, TRAIN_STUDENT, Forked
from students import make_student
from terminals import Terminal
from test_retokenize_job import ROWS, make_model

pytestmark = pytest.mark.slow

# Holds the command after its second piece, until a file is there.
HELD = """
import os, sys, time
os.close(os.open(os.ttyname(0), os.O_RDWR))  # the terminal is ours from now on, with its Ctrl-C
released = sys.argv.pop(1)
from teacher_cache.terminal.progress import Progress

real, num_calls = Progress.set, 0

def held():
    time.sleep(1.2)  # until the rows are shown
    print("here", flush=True)
    end_s = time.monotonic() + 5  # some pieces are finished before a signal is obeyed
    while not os.path.exists(released) and time.monotonic() < end_s:
        time.sleep(0.05)

def slow_set(progress, *args, **more):
    global num_calls
    real(progress, *args, **more)
    num_calls += 1
    if num_calls == 2:
        held()

Progress.set = slow_set
"""
# The Hub, and the processes of a sweep's cells, are stand-ins.
WITHOUT_HUB = """
from test_hub import FakeHub
import teacher_cache.transform.push
teacher_cache.transform.push.HubDataset = FakeHub(None)
"""
WITHOUT_CELLS = """
from student_train.sweep import protocol
from sweeps import add_cell

def run_cell(config, cell, children):
    folder = config.out / "cells" / cell.name
    add_cell(config.out, cell.group, cell.kind, cell.seed, cell.options, 0.5, num_prompts=2,
             prompts=config.eval_prompts)
    (folder / "log.txt").write_text("2026-11-26 22:31:07 training 57/2,800 steps | loss 0.1\\n")
    held()
    return "accuracy 50.0%"

protocol.run_cell = run_cell
"""


@dataclass(frozen=True)
class Case:
    """A command on a terminal.

    Attributes:
        first: What the row with the bar says once two pieces are done.
        second: What the row of figures does, where there are any.
        stays: What stands there at the end.
    """

    words: str
    first: str
    stays: str
    second: str = ""
    stand_in: str = ""
    code: str = CACHE_TEACHER


TIME = r"\| [\d.]+ s"
CASES = {
    "verify": Case("verify cache", r"verified ━+ 1/1 MB", f"verified 1/1 MB {TIME} .*"),
    "export": Case("export cache {out}", r"exported ━.* 2/12 traces \| eta .*",
                   f"exported 12/12 traces {TIME} .*"),
    "truncate": Case("truncate cache {out} --lead-span 0.5", r"truncated ━.* 8/12 traces \| eta .*",
                     f"truncated 12/12 traces {TIME} .*"),
    "push": Case("push cache hf://datasets/me/cache", r"sending cache ━.* 8/9 files \| eta .*",
                 f"sending cache 9/9 files {TIME} .*", stand_in=WITHOUT_HUB),
    "audit": Case("audit source --model teacher --num-traces 4", r"scored ━.* 2/8 traces \| eta .*",
                  rf"scored 8/8 traces \| .*tok/s {TIME} .*", r"\d+ tokens \| .* tok/s"),
    "retokenize": Case(
        "retokenize source {out} --student other --rows rows.jsonl --processes 1",
        r"carried over ━.* 2/12 traces \| eta .*",
        rf"carried over 12/12 traces \| .*tok/s {TIME} .*", r"\d+ tokens \| .* tok/s",
    ),
    "evaluate": Case(
        "evaluate --model student --prompts prompts.jsonl --max-new-tokens 5",
        r"generated ━.* 2/8 answers \| eta .*", rf"generated 8/8 answers \| .* {TIME} .*",
        r"\d right so far, [\d.]+%", code=TRAIN_STUDENT,
    ),
    "sweep": Case(
        "sweep --cache cache --student student --out {out} --eval-prompts prompts.jsonl "
        "--lead-spans 0.5 --baselines= --num-seeds 1",
        "finished ━.* 0/1 cells .*", r".*1/1 span-0\.5_seed-0: accuracy 50\.0%.*",
        r"span-0\.5_seed-0: training 57/2,800 steps \| loss 0\.1", WITHOUT_CELLS, TRAIN_STUDENT,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    teacher = make_model(folder / "teacher", "gpt4", 420)
    rows = write_rows(folder / "rows.jsonl", ROWS)
    score = ("--engine", "transformers", "--dtype", "float32", "--no-capture-prompt", "--top-k", 8)
    invoke("score", "--model", teacher, "--traces", rows, "--out", folder / "source", *score)
    write_rows(folder / "prompts.jsonl", [{"prompt": f"{n} 4", "answer": n} for n in range(8)])
    make_cache(folder / "cache", make_traces(12))
    make_student(folder / "student")
    make_model(folder / "other", "gpt2", 330)
    return folder


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stopped", [False, True])
def test_rows_move_what_is_said_stays_and_the_terminal_is_left_clean(
    parts, tmp_path, name, stopped
):
    case, released = CASES[name], tmp_path / "released"
    words = case.words.format(out=tmp_path / "out").split()

    def start(streams, environment):
        code = HELD + case.stand_in + case.code
        return Forked(code, released, *words, streams=streams, env=environment, cwd=parts)

    with Terminal(80, start) as terminal:
        terminal.read_until(terminal.has_said_here)
        moving = terminal.rows()[-2:] if case.second else terminal.rows()[-1:]
        assert re.match(case.first, moving[0][2:]), moving  # behind what turns
        assert re.fullmatch(case.second or ".*", moving[-1]), moving
        assert max(map(len, moving)) <= 77  # room for ^C
        assert terminal.screen.cursor.hidden

        if stopped:
            terminal.press_ctrl_c()
        else:
            released.touch()
        terminal.read_to_the_end()
        code = terminal.process.wait(timeout=30)
        rows = terminal.rows()

    assert code == (130 if stopped else 0), rows
    assert not terminal.screen.cursor.hidden
    assert "━" not in "".join(rows), rows
    if stopped:
        said = re.compile("^((cache-teacher|train-student): )?stopped", re.MULTILINE)
        assert said.search("\n".join(rows)), rows
        assert "Traceback" not in "".join(rows)
    else:
        assert any(re.fullmatch(case.stays, row) for row in rows), rows
