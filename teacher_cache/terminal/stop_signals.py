"""Ctrl-C and SIGTERM as an exception that never comes in the middle of a write."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """The user or the scheduler asked the job to end; like KeyboardInterrupt, not an error."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSwitch:
    """Remembers the first stop signal and raises it where the work allows."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._held = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler."""
        del frame
        self.signum = self.signum or signum
        if not self._held:
            raise Stopped(self.signum)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A signal that comes inside is raised at the end of the block."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.signum is not None:
            raise Stopped(self.signum)


@contextmanager
def stop_signals() -> Iterator[StopSwitch]:
    """Turn SIGINT and SIGTERM into `Stopped` for the duration of the block."""
    switch = StopSwitch()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(which, switch.handle) for which in signals]
    try:
        yield switch
    finally:
        for which, handler in zip(signals, before, strict=True):
            signal.signal(which, handler)
