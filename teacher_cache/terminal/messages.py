"""A program's messages on stderr, and the log that takes other libraries' output.

Our messages appear from INFO, others' from WARNING. Output that vLLM, Triton, torch and network
clients write at their start goes to a log file, which a failure names. Only a program sets this up,
through `configure`; a script that imports us keeps its own logging and streams.
"""

import contextlib
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from teacher_cache.terminal.escape import printable_lines

if TYPE_CHECKING:
    from rich.console import Console

_OURS = ("teacher_cache", "student_train")
# The end of a traceback, after what a logger writes before each line; a summary of others' errors
# that points there is none.
_EXCEPTION = re.compile(
    r"^(?:\([^)]*\) )?(?:ERROR [^]]*\] )?((?:\w+\.)*\w*(?:Error|Exception|Interrupt): "
    r"(?!.*root cause above).*)$",
    re.MULTILINE,
)
_LINE_WITH_TIME = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Messages:
    """A program's stderr and its log.

    Attributes:
        stream: Stream for our lines, wherever descriptor 2 currently points.
        log_file: Log of others' output; None before any was diverted.
        diverted_to: The open log, while others' output goes there.
        is_quiet: Whether to show only warnings, and no progress.
        is_verbose: Whether to show others' messages too.
        is_debugging: Whether to show tracebacks.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.stream: TextIO = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
        self.log_file: Path | None = None
        self.diverted_to: TextIO | None = None
        self.is_quiet = self.is_verbose = self.is_debugging = self.keeps_log = False
        self._diverted_from = 0  # size of the log when others' output was last diverted into it
        self._handler = _Handler(self)
        root = logging.getLogger()
        root.handlers[:] = [self._handler]
        logging.captureWarnings(True)
        self._set_levels()

    def set_verbosity(self, *, quiet: bool, verbose: bool) -> None:
        """Apply -q and -v."""
        self.is_quiet, self.is_verbose = quiet, verbose
        self._set_levels()

    def set_log_file(self, path: Path) -> None:
        """Log everything to a file, with time stamps.

        Raises:
            OSError: If it cannot be written.
        """
        file = _LogFile(path, encoding="utf-8", errors="backslashreplace")
        file.setFormatter(_Printable(_LINE_WITH_TIME))
        logging.getLogger().addHandler(file)
        self.log_file, self.keeps_log = path, True

    def open_log(self) -> Path | None:
        """The log file, created if missing; None if it cannot be created."""
        if self.log_file is None:
            with contextlib.suppress(OSError):  # a missing log is no reason to stop
                handle, name = tempfile.mkstemp(prefix=f"{self.name}-", suffix=".log")
                os.close(handle)
                self.log_file = Path(name)
        return self.log_file

    def log_to_name(self) -> Path | None:
        """The log file, if there is anything in it, for a message; it is then kept."""
        log = self.log_file
        if log is None or not log.exists() or not log.stat().st_size:
            return None
        self.keeps_log = True
        return log

    def drop_log(self) -> None:
        """Remove a log that the user did not request and that no message names."""
        if self.log_file is not None and not self.keeps_log:
            self.log_file.unlink(missing_ok=True)

    def note_diversion(self) -> None:
        """Let `last_error_said` look at what others say from now on."""
        if self.log_file is not None:
            self._diverted_from = self.log_file.stat().st_size

    def last_error_said(self) -> str:
        """The last exception that others have written of since `note_diversion`, or nothing."""
        if self.log_file is None:
            return ""
        with contextlib.suppress(OSError), self.log_file.open("rb") as log:
            log.seek(self._diverted_from)
            found = _EXCEPTION.findall(log.read().decode(errors="replace"))
            return str(found[-1]).strip() if found else ""
        return ""

    def _set_levels(self) -> None:
        logging.getLogger().setLevel(logging.INFO if self.is_verbose else logging.WARNING)
        for name in _OURS:
            logging.getLogger(name).setLevel(logging.WARNING if self.is_quiet else logging.INFO)
        # A file of a night's run wants to know when; whoever looks at a terminal does.
        has_time = self.is_verbose or not self.stream.isatty()
        form = "%(asctime)s %(message)s" if has_time else "%(message)s"
        self._handler.setFormatter(_Printable(form, datefmt="%Y-%m-%d %H:%M:%S"))


class _Printable(logging.Formatter):
    """Lines in which nothing moves the cursor, on a terminal or when a log is looked at."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one text."""
        return printable_lines(super().format(record))


class _LogFile(logging.FileHandler):
    """A log file that is given up, in one line, once it cannot be written."""

    def handleError(self, record: logging.LogRecord) -> None:  # logging's name
        """Say why, and write nothing more."""
        del record
        logging.getLogger().removeHandler(self)
        say(f"{self.baseFilename}: nothing more is logged there: {sys.exception()}")


class _Handler(logging.Handler):
    """Writes to the program's stderr, above a progress bar if there is one."""

    def __init__(self, messages: Messages) -> None:
        super().__init__()
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        try:
            line = self.format(record)
            log = self._messages.diverted_to
            if log is None or record.name.partition(".")[0] in _OURS:
                say(line)
                return
            try:
                log.write(f"{line}\n")
            except OSError:  # its disk is full
                say(line)
        except Exception:  # as logging treats its own errors
            self.handleError(record)


_messages: Messages | None = None
_console: "Console | None" = None
_said_s = time.monotonic()


def configure(name: str) -> Messages:
    """Set up a program's messages; once, at its start."""
    global _messages
    _messages = Messages(name)
    return _messages


def program_messages() -> Messages | None:
    """The program's messages; None if not set up."""
    return _messages


def is_quiet() -> bool:
    """Whether to hide progress."""
    return _messages is not None and _messages.is_quiet


def is_terminal() -> bool:
    """Whether our lines appear on a terminal."""
    return _stream().isatty()


def last_error_said() -> str:
    """The last exception in the output of others; nothing if none is known."""
    return "" if _messages is None else _messages.last_error_said()


def console() -> "Console":
    """Console for progress bars: the terminal behind stderr."""
    global _console
    from rich.console import Console

    if _console is None or _console.file is not _stream():
        _console = Console(file=_stream())
    return _console


def silence_s() -> float:
    """Seconds since the last message."""
    return time.monotonic() - _said_s


def say(line: str) -> None:
    """Write a line on stderr that is not a result."""
    global _said_s
    _said_s = time.monotonic()
    if _console is not None and is_terminal():  # a bar may be shown there
        console().print(line, markup=False, highlight=False, soft_wrap=True)
    else:
        print(line, file=_stream(), flush=True)


def _stream() -> TextIO:
    return sys.stderr if _messages is None else _messages.stream


@contextmanager
def others_into_log() -> Iterator[None]:
    """Divert the output of libraries and their processes into the log file.

    Processes started inside keep writing there. Nothing is diverted if no program has set up
    its messages, nor with -v.
    """
    program = _messages
    log = None if program is None or program.is_verbose else program.open_log()
    if program is None or log is None:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    before = sys.stdout, sys.stderr
    program.note_diversion()
    # Not closed at the end: loggers of libraries loaded inside keep writing to it.
    file = log.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
    try:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = program.diverted_to = file
        yield
    finally:
        program.diverted_to = None
        sys.stdout, sys.stderr = before
        file.flush()
        for number, descriptor in enumerate(saved, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)
