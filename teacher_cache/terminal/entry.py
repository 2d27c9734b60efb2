"""Entry point of both commands: signals, messages, and error reporting.

Nothing heavy is imported here: from the first line on, Ctrl-C gives one line and exit code 130.

Exit codes: 0; 1 after a failure, told in one line; 2 for wrong usage; 130 and 143 after
SIGINT and SIGTERM. Our exceptions may set another one in an attribute `exit_code`.
"""

import contextlib
import errno
import faulthandler
import importlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn

from teacher_cache.terminal import stop_signals
from teacher_cache.terminal.escape import printable_lines
from teacher_cache.terminal.launched import is_first_process
from teacher_cache.terminal.messages import Messages, configure, program_messages, say
from teacher_cache.terminal.progress import Progress, at_work, clear_displays

_OURS = ("teacher_cache", "student_train")
_EXTRAS = {
    "vllm": ("teacher", "cpu"),
    "ray": ("ray",),
    "peft": ("peft",),
    "datasets": ("dev",),
}
_MEND_AND_REPEAT = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.EMFILE, errno.ENFILE),
}


@dataclass(frozen=True)
class CommandLine:
    """A program: its name, its click group as `package.module:attribute`, and the extras it needs.

    Attributes:
        extras: Extras of the package that install what its commands import.
    """

    name: str
    group: str
    extras: tuple[str, ...]


def run_program(line: CommandLine) -> NoReturn:
    """Run the command line's command, and end the process."""
    # Read when OpenMP is loaded, which no import so far does. Threads that wait by spinning take
    # the cores of any other process: a capture beside one fell from hundreds of tokens/s to seven.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    messages = configure(line.name)
    faulthandler.enable(messages.stream)  # descriptor 2 may point to the log by then
    switch = stop_signals.install(lambda signum: _leave(messages, signum))
    code = 1
    try:
        words = [word for word in sys.argv[1:] if not word.startswith("-")]
        name = f"{line.name} {words[0] if words else ''}".rstrip()
        is_first = is_first_process()
        with Progress(f"{name}: loading", enabled=is_first):
            _load(line)
        with at_work(name) if is_first else contextlib.nullcontext():
            code = run_command(line)
    except stop_signals.Stopped as stopped:
        _leave(messages, stopped.signum)
    except KeyboardInterrupt:  # from a library that has replaced our handler
        _leave(messages, signal.SIGINT)
    _flush()
    messages.drop_log()
    # Threads that vLLM leaves behind sometimes abort the interpreter during its shutdown
    # ("terminate called without an active exception"), after everything is written. And a user who
    # presses Ctrl-C should not wait seconds for torch to shut down.
    if "vllm" in sys.modules or switch.signum is not None:
        os._exit(code)
    sys.exit(code)


def run_command(line: CommandLine) -> int:
    """Run the command line's command.

    Returns:
        The exit code; any error has been reported in one line.

    Raises:
        Stopped: After a signal.
    """
    messages = program_messages()
    try:
        run_group, group = _load(line)
        return run_group(group)
    except (stop_signals.Stopped, KeyboardInterrupt):
        raise
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:
        if messages is not None and messages.is_debugging:
            traceback.print_exception(error, file=messages.stream)
        _say(line.name, _line(messages, error, line.extras))
        return int(getattr(error, "exit_code", 1))


def _load(line: CommandLine) -> tuple[Callable[[Any], int], Any]:
    from teacher_cache.terminal.group import run_group

    module, _, attribute = line.group.partition(":")
    return run_group, getattr(importlib.import_module(module), attribute)


def _line(messages: Messages | None, error: BaseException, extras: tuple[str, ...]) -> str:
    """Message for an error, and where to read more."""
    if isinstance(error, ModuleNotFoundError) and not is_ours(error.name or ""):
        return f"{error.name} is not installed; {_advice(error.name or '', extras)}"
    if isinstance(error, MemoryError) or str(error) == "can't start new thread":
        return f"out of memory: {' '.join(str(error).split()) or 'this machine has no more'}"
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in _MEND_AND_REPEAT:
        text = f"{text}; what was finished before is kept; fix this and run the same command again"
    elif not _is_meant_for_people(error):
        written = _write_traceback(messages, error)
        where = f"; the traceback is in {written}" if written else "; --debug shows a traceback"
        return f"{type(error).__name__}: {text or 'no message'}{where}"
    log = None if messages is None else messages.log_to_name()
    return text if log is None else f"{text} (other output is in {log})"


def _advice(module: str, extras: tuple[str, ...]) -> str:
    # The name on the package index is not ours: install from a checkout only.
    found = _EXTRAS.get(module.partition(".")[0], extras)
    if found == ("teacher", "cpu"):
        return (
            "in a checkout of leadspan: pip install '.[teacher]' with a GPU, '.[cpu]' without one"
        )
    return f"in a checkout of leadspan: pip install '.[{found[0]}]'"


def is_ours(module: str) -> bool:
    """Whether a module's name is one of this project."""
    return module.partition(".")[0] in _OURS


def _is_meant_for_people(error: BaseException) -> bool:
    """Whether the message is ours or the system's: its class or its raiser is ours."""
    if is_ours(type(error).__module__):
        return True
    if isinstance(error, OSError) and type(error).__module__ == "builtins":
        return error.errno is not None or _raised_by_us(error.__traceback__)
    return isinstance(error, ValueError) and _raised_by_us(error.__traceback__)


def _raised_by_us(trace: TracebackType | None) -> bool:
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    return is_ours(trace.tb_frame.f_globals.get("__name__", ""))


def _write_traceback(messages: Messages | None, error: BaseException) -> str | None:
    log = None if messages is None else messages.open_log()
    if messages is None or log is None:
        return None
    with contextlib.suppress(OSError):
        with log.open("a", encoding="utf-8") as file:
            traceback.print_exception(error, file=file)
        return str(messages.log_to_name())
    return None


def _say(name: str, line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
        say(f"{name}: {printable_lines(line)}")


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _leave(messages: Messages, signum: int) -> NoReturn:
    """End the process at once after a signal: finished work is already safe."""
    try:
        for child in multiprocessing.active_children():
            _kill(child.pid)
        clear_displays()
        what = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        _say(messages.name, f"stopped by {what}")
        _flush()
        messages.drop_log()
    finally:
        os._exit(128 + signum)


def _kill(pid: int | None) -> None:
    """End a child, and its own children if it has a session of its own."""
    if pid is None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)
