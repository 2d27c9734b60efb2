"""Mathematics compared by math-verify, in a process that can be ended.

A model's answer can demand unlimited symbolic work (`10^{10^{10}}` alone is 10 billion digits),
which cannot be interrupted from inside: it runs in C code that holds the interpreter.
"""

import importlib.util
import json
import resource
import select
import subprocess
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Self

CPU_LIMIT_S = 3.0  # ordinary answers take a few milliseconds, the first ones 0.1 s
MEMORY_LIMIT_BYTES = 1 << 30  # a worker at rest has 0.1 GiB
# No single allocation gets beyond this one. It is not the limit itself because what fails there
# raises MemoryError, which sympy swallows here and there and then finds the answers different.
_ADDRESS_LIMIT_BYTES = 8 << 30
_POLL_S = 0.05
_WALL_LIMIT_S = 60.0  # the limit of a worker that gets no CPU time
_START_LIMIT_S = 120.0


class Comparison(StrEnum):
    """Result of comparing two texts as mathematics."""

    SAME = "same"
    DIFFERENT = "different"
    ERROR = "error"  # math-verify cannot compare them
    BEYOND_LIMITS = "beyond limits"  # of time or memory


class Mathematics:
    """The worker process; use it inside a `with` block. It starts when it is first needed."""

    def __init__(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ModuleNotFoundError("math_verify is not installed", name="math_verify")
        self._worker: subprocess.Popen[bytes] | None = None
        self._known: dict[tuple[str, str], Comparison] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def compare(self, found: str, gold: str) -> Comparison:
        """Compare two answers; each pair only once, since students repeat themselves."""
        pair = (_as_mathematics(found), _as_mathematics(gold))
        if pair not in self._known:
            self._known[pair] = self._ask(pair)
        return self._known[pair]

    def _ask(self, pair: tuple[str, str]) -> Comparison:
        worker = self._worker or self._start()
        _send(worker, pair)
        reply = _receive(worker, _WALL_LIMIT_S)
        if reply is None:
            self._end()
            return Comparison.BEYOND_LIMITS
        return Comparison(str(reply))

    def _start(self) -> "subprocess.Popen[bytes]":
        script = Path(__file__).with_name("math_worker.py")
        limits = [str(CPU_LIMIT_S), str(_ADDRESS_LIMIT_BYTES)]
        # -P: modules beside the script must not stand in for others of the same name.
        worker = subprocess.Popen(
            [sys.executable, "-P", str(script), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._worker = worker
        if _receive(worker, _START_LIMIT_S) is None:
            self._end()
            raise RuntimeError(
                "the process that compares mathematics did not start; its message is above"
            )
        return worker

    def _end(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.communicate()


def _send(worker: "subprocess.Popen[bytes]", request: object) -> None:
    if worker.stdin is not None:  # it is a pipe
        worker.stdin.write(json.dumps(request).encode() + b"\n")
        worker.stdin.flush()


def _receive(worker: "subprocess.Popen[bytes]", limit_s: float) -> object:
    """One line of the worker; None if it has ended, has grown too large or time is up."""
    if worker.stdout is None:  # it is a pipe
        return None
    deadline_s = time.monotonic() + limit_s
    while not select.select([worker.stdout], [], [], _POLL_S)[0]:
        if time.monotonic() > deadline_s or _resident_bytes(worker.pid) > MEMORY_LIMIT_BYTES:
            return None
    line = worker.stdout.readline()
    return json.loads(line) if line.endswith(b"\n") else None


def _resident_bytes(pid: int) -> int:
    """Memory of a process; 0 where the system has no /proc, or the process has ended."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(pages) * resource.getpagesize()


def _as_mathematics(text: str) -> str:
    """A text between the marks where math-verify looks for mathematics."""
    has_marks = any(mark in text.strip("$") for mark in ("$", "\\(", "\\["))
    return text if has_marks else f"${text.strip('$')}$"
