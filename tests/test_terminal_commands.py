"""Long commands on a real terminal of 80 columns: what moves, what stays, and Ctrl-C.

Each runs forked, and is held once it has done its second piece, so that its rows can be looked at.
"""

from dataclasses import dataclass
from pathlib import Path

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
    while not os.path.exists(released):
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
    print("here", flush=True)
    while not (os.path.exists(released) or children.stopped_by):
        time.sleep(0.05)
    return "accuracy 50.0%"

protocol.run_cell = run_cell
"""


@dataclass(frozen=True)
class Case:
    """A command, what its two rows say once two pieces are done, and what stays at the end."""

    words: str
    first: str
    second: str = ""  # figures, where it has any
    stays: str = ""
    stand_in: str = ""
    code: str = CACHE_TEACHER


CASES = {
    "verify": Case("verify {cache}", "verified 1/1 MB"),
    "export": Case("export {cache} {out}.jsonl", "exported 2/12 traces"),
    "truncate": Case("truncate {cache} {out} --lead-span 0.5", "truncated 8/12 traces"),
    "push": Case(
        "push {cache} hf://datasets/me/cache", "sending {cache}", stand_in=WITHOUT_HUB
    ),
    "audit": Case("audit {source} --model {teacher} --num-traces 4", "scored 2/8 traces", "tok/s"),
    "retokenize": Case(
        "retokenize {source} {out} --student {other} --rows {rows} --processes 1",
        "carried over 2/12 traces", "tok/s",
    ),
    "evaluate": Case(
        "evaluate --model {student} --prompts {prompts} --max-new-tokens 5",
        "generated 2/8 answers", "right so far", code=TRAIN_STUDENT,
    ),
    "sweep": Case(
        "sweep --cache {cache} --student {student} --out {out} --eval-prompts {prompts} "
        "--lead-spans 0.5 --baselines= --num-seeds 1",
        "finished 0/1 cells", "span-0.5_seed-0: training 57/2,800 steps | loss 0.1",
        "1/1 span-0.5_seed-0: accuracy 50.0%", WITHOUT_CELLS, TRAIN_STUDENT,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    teacher = make_model(folder / "teacher", "gpt4", 420)
    rows = write_rows(folder / "rows.jsonl", ROWS)
    score = ("--engine", "transformers", "--dtype", "float32", "--no-capture-prompt", "--top-k", 8)
    invoke("score", "--model", teacher, "--traces", rows, "--out", folder / "source", *score)
    prompts = [{"prompt": f"{n} 4", "answer": n} for n in range(8)]
    return {
        "cache": make_cache(folder / "cache", make_traces(12)), "source": folder / "source",
        "student": make_student(folder / "student"), "rows": rows, "teacher": teacher,
        "other": make_model(folder / "other", "gpt2", 330),
        "prompts": write_rows(folder / "prompts.jsonl", prompts),
    }  # fmt: skip


@pytest.mark.parametrize("ends", ["by itself", "by Ctrl-C"])
@pytest.mark.parametrize("name", CASES)
def test_two_rows_move_the_rest_stays_and_the_terminal_is_left_clean(parts, tmp_path, name, ends):
    case, released = CASES[name], tmp_path / "released"
    known = {**parts, "out": tmp_path / "out"}
    words = [word.format(**known) for word in case.words.split()]

    def start(streams, environment):
        code = HELD + case.stand_in + case.code
        return Forked(code, released, *words, streams=streams, env=environment)

    with Terminal(80, start) as terminal:
        seen = terminal.read_until(terminal.has_said_here)
        moving = terminal.rows()[-2:] if case.second else terminal.rows()[-1:]
        doing = case.first.format(**known)
        assert moving[0][2:].startswith(doing[:40].split(" ")[0])
        for part in doing.split(" ")[1:2] if "/" in case.first and name != "push" else ():
            assert part in moving[0]
        assert case.second in moving[-1]
        assert max(len(row) for row in moving) <= 77  # room for ^C

        if ends == "by itself":
            released.touch()
        else:
            terminal.press_ctrl_c()
        seen |= terminal.read_to_the_end()
        code = terminal.process.wait(timeout=30)
        rows = terminal.rows()
        print(name, ends, moving, rows)
        assert not terminal.screen.cursor.hidden
        assert not [row for row in rows if "━" in row or row in moving]
        assert code == (0 if ends == "by itself" else 130), rows
        if ends == "by itself":
            assert case.stays in "".join(rows)
        else:
            assert rows[-1] == ""
