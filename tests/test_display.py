"""Progress on a real terminal: two rows that fit it, lines that stay, and a clean end."""

import subprocess
import sys

import pytest
from terminals import Terminal

from student_train.run.progress import describe, heldout_line
from student_train.sweep.at_work import CellsAtWork
from teacher_cache.terminal.display import fitting

METRICS = {
    "loss": 0.0612, "kl": 0.0095, "ce": 0.1129, "top1_agreement": 0.971, "tokens_per_s": 123_456,
    "peak_memory_bytes": 70 * 2**30, "lr": 1e-5, "data_wait_share": 0.03, "student_mass": 0.9,
    "teacher_mass": 0.999,
}  # fmt: skip
HELDOUT = {
    "heldout_kl": 0.0123, "heldout_kl_cot": 0.0123, "heldout_kl_answer": 0.01,
    "heldout_top1_agreement": 0.971,
}  # fmt: skip
LONG_RUN = """
import logging, os, sys, time
os.close(os.open(os.ttyname(0), os.O_RDWR))  # the terminal is ours from now on, with its Ctrl-C

from teacher_cache.terminal import entry
from teacher_cache.terminal.progress import Progress

logger = logging.getLogger("student_train.x")

def run(group):
    with Progress({doing!r}, 1_022_500, "steps", first=0) as shown:
        shown.set(5, {figures!r})
        time.sleep(1.2)
        logger.info({heldout!r})
        with Progress("writing a checkpoint"):
            time.sleep(1.2)
        shown.set(21_000)
        time.sleep(0.6)
        print("here", flush=True)
        {end}
    return 0

entry._load = lambda line: (run, None)
entry.run_program(entry.CommandLine("train-student", "", ()))
"""
WAIT = "time.sleep(30)"
# A library that swallows the exception: the process ends itself, while a display is on.
SWALLOW = """
        try:
            time.sleep(30)
        except BaseException:
            time.sleep(30)
"""


def on_terminal(code, columns):
    def start(streams, environment):
        stdin, stdout, stderr = streams
        return subprocess.Popen(
            [sys.executable, "-c", code], stdin=stdin, stdout=stdout, stderr=stderr,
            env=environment, start_new_session=True,
        )  # fmt: skip

    return Terminal(columns, start)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 44])
def test_two_rows_fit_and_what_is_held_out_stays(columns):
    said = heldout_line(22_500, HELDOUT)
    code = LONG_RUN.format(doing="training", figures=describe(METRICS), heldout=said, end=WAIT)
    with on_terminal(code, columns) as terminal:
        seen = terminal.read_until(terminal.has_said_here)
        rows = terminal.rows()
        wrapped = [said[n : n + columns].rstrip() for n in range(0, len(said), columns)]

        assert len(said) <= 80
        assert rows[: len(wrapped)] == wrapped
        assert len(rows) == len(wrapped) + 2
        bar, figures = rows[-2:]
        assert bar[2:].startswith("training ")
        assert "21,000/1,022,500 steps" in bar
        assert ("━" in bar) == ("eta " in bar) == (columns == 80)
        assert describe(METRICS).startswith(figures)
        assert max(map(len, rows[-2:])) <= columns - 3
        assert any("writing a checkpoint" in row and "so far" in row for row in seen)

        terminal.press_ctrl_c()
        terminal.read_to_the_end()
        assert terminal.process.wait(timeout=10) == 130
        assert terminal.rows() == [*wrapped, "train-student: stopped by Ctrl-C"]
        assert not terminal.screen.cursor.hidden


@pytest.mark.slow
def test_a_program_that_ends_itself_leaves_a_clean_terminal_too():
    code = LONG_RUN.format(doing="training " * 20, figures="x" * 200, heldout="held", end=SWALLOW)
    with on_terminal(code, 80) as terminal:
        seen = terminal.read_until(terminal.has_said_here)
        assert max(map(len, seen)) <= 77
        terminal.press_ctrl_c()
        terminal.read_to_the_end()

        assert terminal.process.wait(timeout=10) == 130
        assert terminal.rows() == ["held", "train-student: stopped by Ctrl-C"]
        assert not terminal.screen.cursor.hidden


@pytest.mark.parametrize(
    ("width", "text"),
    [(99, "one | two | three"), (9, "one | two"), (8, "one"), (3, "one"), (2, "o…"), (0, "")],
)
def test_leading_parts_are_shown_as_far_as_they_fit(width, text):
    assert fitting(["one", "two", "three"], width) == text


def test_cells_at_work_say_how_far_they_are(tmp_path):
    cells = CellsAtWork()
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("x" * 5000 + "\n2026-11-26 22:31:07 training 57/2,800 steps | loss 0.1\n\n")

    with cells.of("span-1_seed-0", first):
        assert cells.described() == "span-1_seed-0: training 57/2,800 steps | loss 0.1"
        with cells.of("base", second):
            assert cells.described() == "span-1_seed-0: training 57/2,800 steps | base: starting"
    assert cells.described() == ""
