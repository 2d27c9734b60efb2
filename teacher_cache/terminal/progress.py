"""Progress of a task: two rows on a terminal, a line every 10 s elsewhere."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from teacher_cache.terminal.messages import console, is_quiet, is_terminal, silence_s

if TYPE_CHECKING:
    from rich.live import Live

logger = logging.getLogger(__name__)

LINE_INTERVAL_S = 10.0
_FIRST_S = 0.8  # shorter tasks are not shown
_CLEAR_S = 0.3

_T = TypeVar("_T")


def duration(seconds: float) -> str:
    """A readable duration: 0.4 s, 42 s, 9 min 17 s, 5 h 3 min, 2 d 4 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    total_s = round(seconds)
    for unit_s, unit, part_s, part in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if total_s >= unit_s:
            rest = total_s % unit_s // part_s
            return f"{total_s // unit_s} {unit}" + (f" {rest} {part}" if rest else "")
    return f"{total_s} s"


class Progress:
    """Shows what is being done, how far it is, and the time left; a `with` block.

    Args:
        doing: Words such as "captured" or "starting vLLM".
        total: Number of units in all; None if unknown.
        unit: Name of the units, such as "traces".
        first: Number of units done before.
        hint: Usual duration, if there is no total.
        watch: Gives the figures whenever they are shown, for work that other processes do.
        enabled: Whether to show anything; among several processes, one does.
    """

    def __init__(
        self,
        doing: str,
        total: int | None = None,
        unit: str = "",
        *,
        first: int = 0,
        hint: str = "",
        watch: Callable[[], str] | None = None,
        enabled: bool = True,
    ) -> None:
        self.doing, self._unit, self._hint, self._watch = doing, unit, hint, watch
        self._total, self._first, self._done = total, first, first
        self._figures = ""
        self._enabled = enabled and not is_quiet()
        self._display: Live | None = None
        self._has_ended = threading.Event()
        self._started_s = self._said_s = time.monotonic()
        self._has_said = False

    def __enter__(self) -> Self:
        self._started_s = self._said_s = time.monotonic()
        if self._enabled:
            self._outer = _shown[-1] if _shown else None
            _shown.append(self)
            self._ticker = threading.Thread(target=self._tick, daemon=True, name="progress")
            self._ticker.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._enabled:
            return
        self._has_ended.set()
        self._ticker.join()
        _shown.remove(self)
        if self._display is not None:
            self._display.stop()
            if self._outer is not None and self._outer._display is not None:
                # A new one: a display that starts again erases lines above that are not its own.
                self._outer._start_display()
        if self._has_said and self._done != self._first and kind is None:
            logger.info("%s", self.line)

    @property
    def seconds(self) -> float:
        """Seconds since the block began."""
        return time.monotonic() - self._started_s

    @property
    def line(self) -> str:
        """The progress on one line."""
        parts = (f"{self.doing} {self.counted}".rstrip(), self.figures, self._time(), self.rate)
        return " | ".join(text for text in parts if text)

    @property
    def figures(self) -> str:
        """Figures of the work."""
        return self._figures if self._watch is None else self._watch()

    @property
    def counts(self) -> Sequence[str]:
        """Units done, time and rate, as far as they are known; the most important first."""
        return [text for text in (self.counted, self._time(), self.rate) if text]

    @property
    def share(self) -> float | None:
        """Share of the units done; None if there is no total."""
        return None if self._total is None else self._done / max(1, self._total)

    @property
    def rate(self) -> str:
        """Units per second, minute or hour since the beginning; empty before anything is done."""
        num_now = self._done - self._first
        if num_now <= 0 or not self._unit:
            return ""
        for unit_s, unit in ((1, "s"), (60, "min"), (3600, "h")):
            rate = num_now / max(self.seconds, 1e-9) * unit_s
            if rate >= 1 or unit == "h":
                break
        number = f"{rate:,.0f}" if rate >= 99.5 else f"{rate:.2g}"
        return f"{number} {self._unit}/{unit}"

    @property
    def counted(self) -> str:
        """Units done, and the total; empty if none are counted."""
        if self._total is None:
            return f"{self._done:,} {self._unit}" if self._done else ""
        return f"{self._done:,}/{self._total:,} {self._unit}".rstrip()

    def set(self, done: int, figures: str | None = None, *, total: int | None = None) -> None:
        """Set the number of units done; figures stay as they are without new ones."""
        self._done = done
        if figures is not None:
            self._figures = figures
        if total is not None:
            self._total = total

    def add(self, num_units: int = 1, figures: str | None = None) -> None:
        """Add finished units."""
        self.set(self._done + num_units, figures)

    def counting(self, items: Iterable[_T]) -> Iterator[_T]:
        """Give items one by one; each is finished when the next is asked for."""
        for item in items:
            yield item
            self.add()

    @property
    def eta_s(self) -> float | None:
        """Seconds to the end at the rate so far; None before anything is known."""
        num_now = self._done - self._first
        if self._total is None or num_now <= 0:
            return None
        return self.seconds / num_now * (self._total - self._done)

    def _time(self) -> str:
        if self._done == self._total:
            return duration(self.seconds)
        if self.eta_s is not None:
            return f"eta {duration(self.eta_s)}"
        if not self._has_said:
            return self._hint
        return f"{duration(self.seconds)} so far" + (f" ({self._hint})" if self._hint else "")

    def _start_display(self) -> None:
        from teacher_cache.terminal.display import start_display

        self._display = start_display(self, console())

    def _tick(self) -> None:
        if self._has_ended.wait(_FIRST_S):
            return
        if is_terminal():
            if self._outer is not None and self._outer._display is not None:
                self._outer._display.stop()
            self._has_said = True
            self._start_display()
            return
        wait_s = 0.0
        while not self._has_ended.wait(wait_s):
            logger.info("%s", self.line)
            self._has_said, wait_s = True, LINE_INTERVAL_S


@contextmanager
def at_work(name: str) -> Iterator[None]:
    """Report regularly inside the block if no other message appears."""
    has_ended = threading.Event()
    started_s = time.monotonic()

    def tick() -> None:
        last_shown_s = started_s
        while not has_ended.wait(1.0):
            if _shown or is_quiet():
                last_shown_s = time.monotonic()
            elif min(silence_s(), time.monotonic() - last_shown_s) >= LINE_INTERVAL_S:
                so_far = duration(time.monotonic() - started_s)
                logger.info("%s: at work, %s so far", name, so_far)

    threading.Thread(target=tick, daemon=True, name="at-work").start()
    try:
        yield
    finally:
        has_ended.set()


def clear_displays() -> None:
    """Leave a clean terminal before the process ends at once."""

    def clear() -> None:
        for progress in reversed(_shown):
            if progress._display is not None:
                progress._display.stop()

    # Whoever holds a display's lock may never let it go.
    clearing = threading.Thread(target=clear, daemon=True, name="clear-displays")
    clearing.start()
    clearing.join(_CLEAR_S)


_shown: list[Progress] = []  # from the outermost to the innermost
