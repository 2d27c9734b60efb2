"""Progress of a capture: a bar on a terminal, a line every 10 s elsewhere."""

import logging
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

logger = logging.getLogger(__name__)

LINE_INTERVAL_S = 10.0


class CaptureProgress:
    """Counts finished traces and tokens, and says so."""

    def __init__(self, num_traces: int, *, doing: str = "captured") -> None:
        """Begin to count towards `num_traces`; `doing` is said of each."""
        self._doing = doing
        self.num_traces = 0
        self.num_tokens = 0
        self.num_unfinished = 0  # traces cut by length
        self._total = num_traces
        self._started_s = self._said_s = time.monotonic()
        self._bar: RichProgress | None = None
        if sys.stderr.isatty():
            self._bar = RichProgress(
                TextColumn(doing),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("traces | {task.fields[rate]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("capture", total=num_traces, rate="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.num_traces:
            self._say()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._started_s

    def add(self, num_tokens: int, *, cut_by_length: bool = False) -> None:
        """Count one finished trace."""
        self.num_traces += 1
        self.num_tokens += num_tokens
        self.num_unfinished += cut_by_length
        if self._bar is not None:
            self._bar.update(self._task, advance=1, rate=self._rate())
        elif time.monotonic() - self._said_s >= LINE_INTERVAL_S:
            self._say()

    def _rate(self) -> str:
        per_second = self.num_tokens / max(self.seconds, 1e-9)
        return f"{self.num_tokens:,} tokens | {per_second:,.0f} tok/s"

    def _say(self) -> None:
        self._said_s = time.monotonic()
        left_s = self.seconds / self.num_traces * (self._total - self.num_traces)
        logger.info(
            "%s %s/%s traces | %s | eta %.0f s",
            self._doing,
            f"{self.num_traces:,}",
            f"{self._total:,}",
            self._rate(),
            left_s,
        )
