"""Answers that are work without end, made to hurt: each is over within the limits and counted."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from student_train.evaluation import mathematics
from student_train.evaluation.answers import final_answer
from student_train.evaluation.checker import Checker
from student_train.evaluation.mathematics import Comparison, Mathematics

WORKER = Path(mathematics.__file__).with_name("math_worker.py")
QUICK_S = 0.3  # of CPU time, in these tests

WITHOUT_END = [
    r"10^{10^{10}}",
    r"\frac{1}{10^{10^{10}}}",
    r"9^{9^{9^{9}}}",
    r"(10^9)!",
    r"\binom{10^9}{10^8}",
    r"\prod_{i=1}^{10^9} i",
    r"\log_{10}(10^{10^{9}})",
    r"\sin(10^{10^{9}})",
    r"(x+y+z+w)^{400}",
    "{" * 900,
    "(" * 400 + "1" + ")" * 400,
    "x^" * 300 + "x",
]
ODD = [
    "(" * 5000,
    "9" * 100_000,
    r"\sqrt{" * 200 + "2" + "}" * 200,
    r"1/0",
    r"0^0",
    "\x00",
    "\ud800",
    r"\frac" * 300,
    "$" * 900,
    r"\boxed{" * 100,
    "1," * 400 + "1",
    "ÿ" * 900,
    "1e999999999",
]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(mathematics, "CPU_LIMIT_S", QUICK_S)


@pytest.mark.slow
def test_answers_without_end_are_counted_and_the_next_one_is_compared(quick):
    with Checker() as checker:
        for answer in WITHOUT_END[:4]:
            verdict = checker.check(answer, "7")
            assert (verdict.is_right, verdict.compared_as) == (False, "beyond limits"), answer
        assert checker.check("x+1", "1+x").is_right


@pytest.mark.slow
@pytest.mark.parametrize("gold", ["7", "x+1"])
def test_every_hostile_answer_is_over_in_time(quick, gold):
    with Checker() as checker:
        for answer in [*WITHOUT_END, *ODD]:
            started_s = time.monotonic()
            assert not checker.check(final_answer(answer), gold).is_right, answer
            # A process that was ended is started again, which takes most of the time.
            assert time.monotonic() - started_s < 30, answer


@pytest.mark.slow
def test_a_gold_without_end_is_as_harmless(quick):
    with Mathematics() as compare:
        assert compare.compare("7", r"10^{10^{10}}") is Comparison.BEYOND_LIMITS


@pytest.mark.slow
def test_a_pair_is_compared_once(quick):
    with Mathematics() as compare:
        assert compare.compare(r"9^{9^{9^{9}}}", "7") is Comparison.BEYOND_LIMITS
        started_s = time.monotonic()
        assert compare.compare(r"9^{9^{9^{9}}}", "7") is Comparison.BEYOND_LIMITS
        assert time.monotonic() - started_s < 0.05


@pytest.mark.slow
def test_memory_has_a_limit_too(monkeypatch):
    monkeypatch.setattr(mathematics, "CPU_LIMIT_S", 600.0)
    with Mathematics() as compare:
        assert compare.compare("x+1", "1+x") is Comparison.SAME
        monkeypatch.setattr(mathematics, "MEMORY_LIMIT_BYTES", 1 << 20)  # less than it has
        assert compare.compare("10^{10^{10}}", "7") is Comparison.BEYOND_LIMITS


@pytest.mark.slow
def test_the_worker_ends_itself_when_who_asked_is_gone():
    worker = subprocess.Popen(
        [sys.executable, "-P", str(WORKER), str(QUICK_S), str(1 << 31)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ,
    )  # fmt: skip
    worker.stdout.readline()
    worker.stdin.write(b'["$10^{10^{10}}$", "$7$"]\n')
    worker.stdin.close()

    assert worker.wait(timeout=60) == -signal.SIGPROF
    worker.stdout.close()


def test_without_math_verify_nothing_is_compared_another_way(monkeypatch):
    monkeypatch.setattr(mathematics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="math_verify is not installed"):
        Checker()
