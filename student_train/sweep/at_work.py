"""The cells that are being run, and how far each is, by the last line of its log."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TIME = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")  # as `messages` writes it
_LAST_BYTES = 1000


class CellsAtWork:
    """Names of cells, and their logs; threads enter and leave, another one asks."""

    def __init__(self) -> None:
        self._logs: dict[str, Path] = {}

    @contextmanager
    def of(self, name: str, log: Path) -> Iterator[None]:
        """Count a cell as at work inside the block."""
        self._logs[name] = log
        try:
            yield
        finally:
            del self._logs[name]

    def described(self) -> str:
        """`span-0.5_seed-1: training 57/2,800 steps | loss 0.0567 | ...`, for each cell."""
        said = [f"{name}: {_last_line(log)}" for name, log in list(self._logs.items())]
        if len(said) > 1:  # the rows of a terminal hold no more than how far each is
            said = [line.partition(" | ")[0] for line in said]
        return " | ".join(said)


def _last_line(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        lines = []
    whole = [line for line in lines if line.strip()]
    if not whole:
        return "starting"
    last = whole[-1]
    time = _TIME.match(last)
    return last[time.end() if time else 0 :].decode(errors="replace")
