"""Progress of a capture: finished traces, their tokens, and the rate."""

from types import TracebackType
from typing import Self

from teacher_cache.terminal.progress import Progress


class CaptureProgress:
    """Counts finished traces and tokens, and shows them; a `with` block."""

    def __init__(self, num_traces: int | None, *, doing: str = "captured") -> None:
        """Begin to count towards `num_traces`, None if unknown; `doing` is the verb shown."""
        self._shown = Progress(doing, num_traces, "traces")
        self.num_traces = 0
        self.num_tokens = 0
        self.num_unfinished = 0  # traces cut off by length

    def __enter__(self) -> Self:
        self._shown.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._shown.__exit__(kind, error, traceback)

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return self._shown.seconds

    def add(self, num_tokens: int, *, cut_by_length: bool = False) -> None:
        """Count one finished trace."""
        self.num_traces += 1
        self.num_tokens += num_tokens
        self.num_unfinished += cut_by_length
        self._show()

    def leave_out(self) -> None:
        """Count one trace that is not wanted after all: it is done with, and has no tokens."""
        self._show()

    def _show(self) -> None:
        per_second = self.num_tokens / max(self.seconds, 1e-9)
        self._shown.add(1, f"{self.num_tokens:,} tokens | {per_second:,.0f} tok/s")
