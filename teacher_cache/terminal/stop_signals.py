"""Ctrl-C and SIGTERM: as an exception, held back while something is written, or only noted.

A program installs one switch for as long as it runs. A signal's effect depends on the block
in which it arrives:

    plain code          raises `Stopped` in the main thread, at once
    switch.held()       raises it at the end of the block: for a write that must not be interrupted
    switch.noted()      only sets `switch.signum`: for work that ends cleanly by itself;
                        a second signal raises

A library may swallow the exception, or the main thread may sit in C code and never raise it. So a
thread watches, and ends the process if it has not ended by itself within GRACE_S.
"""

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, Protocol

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_S = 2.0  # from a signal to the end of the process, if nothing delays it
# A second signal within this time is the first one again: a terminal sends it to every process of
# a group, and a launcher passes it on once more.
_ECHO_S = 1.0
_INSISTING_S = 0.5  # from a second signal to the end
_LOOK_S = 0.05


class Stopped(BaseException):
    """The user or the scheduler asked the program to end; like KeyboardInterrupt, not an error."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class OnStop(Protocol):
    """Callback for a signal."""

    def __call__(self, signum: int, *, insists: bool) -> None:
        """Handle a signal; `insists` marks a second one."""
        ...


class StopSwitch:
    """Remembers the first stop signal, and raises it where the work allows.

    Attributes:
        signum: Signal received; None before.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._came_s = 0.0
        self._num_holds = 0
        self._num_notes = 0
        self._on_stop: OnStop | None = None
        self._insists = False  # whether a second signal came

    @property
    def is_patient(self) -> bool:
        """Whether the process may take longer to end."""
        return not self._insists and (self._num_holds > 0 or self._num_notes > 0)

    @property
    def is_held(self) -> bool:
        """Whether a write is in progress."""
        return self._num_holds > 0

    def insist(self) -> None:
        """Note a second signal: nothing delays the end any longer."""
        self._insists = True

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        del frame
        now_s = time.monotonic()
        if self.signum is None:
            self.signum, self._came_s = signum, now_s
            if self._num_notes:
                self._call(insists=False)
                return
        elif now_s - self._came_s < _ECHO_S:
            return
        else:
            self.insist()
            self._call(insists=True)
        if self._num_holds == 0:
            raise Stopped(self.signum)

    def _call(self, *, insists: bool) -> None:
        if self._on_stop is not None and self.signum is not None:
            self._on_stop(self.signum, insists=insists)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Raise a signal received inside at the end of the block."""
        self._num_holds += 1
        try:
            yield
        finally:
            self._num_holds -= 1
        if self.signum is not None and (self._num_notes == 0 or self._insists):
            raise Stopped(self.signum)

    @contextmanager
    def noted(self, on_stop: OnStop | None = None) -> Iterator[None]:
        """Let the first signal received inside set `signum` without raising.

        Args:
            on_stop: Called in the handler, with the signal's number and whether it is the second.
        """
        self._num_notes += 1
        before, self._on_stop = self._on_stop, on_stop
        try:
            yield
        finally:
            self._num_notes -= 1
            self._on_stop = before


_installed: StopSwitch | None = None


@contextmanager
def stop_signals() -> Iterator[StopSwitch]:
    """The program's switch, or a temporary one for the block if no program has one.

    Outside the main thread, the host handles signals: the switch never receives one.
    """
    if _installed is not None:
        yield _installed
        return
    switch = StopSwitch()
    if threading.current_thread() is not threading.main_thread():
        yield switch
        return
    before = {number: signal.signal(number, switch.handle) for number in STOP_SIGNALS}
    try:
        yield switch
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def install(leave: Callable[[int], NoReturn]) -> StopSwitch:
    """Install a switch for the whole program.

    Args:
        leave: Ends the process, given the signal; called by the watching thread if needed.
    """
    global _installed
    switch = _installed = StopSwitch()
    for number in STOP_SIGNALS:
        signal.signal(number, switch.handle)
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    # Written to by the C handler, even while no bytecode runs, or when another library's handler
    # has replaced ours.
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(
        target=_watch, args=(switch, read_end, leave), daemon=True, name="stop-signals"
    ).start()
    return switch


def _forget() -> None:
    """Detach a forked child, which shares the pipe: its signals are not ours."""
    global _installed
    _installed = None
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _watch(switch: StopSwitch, read_end: int, leave: Callable[[int], NoReturn]) -> None:
    signum = _next_signal(read_end, None)
    came_s = time.monotonic()
    deadline_s, has_said = came_s + GRACE_S, False
    while (now_s := time.monotonic()) < deadline_s:
        if _next_signal(read_end, _LOOK_S) is not None and now_s - came_s > _ECHO_S:
            switch.insist()
            deadline_s = min(deadline_s, now_s + _INSISTING_S)
        elif switch.is_patient:
            deadline_s = now_s + GRACE_S
            if switch.is_held and not has_said and now_s - came_s > _ECHO_S:
                has_said = True
                logger.info("stopping after the current write (signal again to stop at once)")
    leave(signum or signal.SIGTERM)


def _next_signal(read_end: int, timeout_s: float | None) -> int | None:
    """The next stop signal from the pipe; None if none comes in time."""
    while select.select([read_end], [], [], timeout_s)[0]:
        number = os.read(read_end, 1)[0]
        if number in STOP_SIGNALS:
            return number
    return None
