"""The group of a program's commands: their common options, and their exit codes.

Besides `commands`, the only module outside the cli folders that imports click.
"""

import signal
from pathlib import Path
from typing import Any

import click

from teacher_cache.terminal import messages
from teacher_cache.terminal.stop_signals import Stopped


class Program(click.Group):
    """A group whose commands all have the options for verbosity and logging."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command."""
        cmd.params.extend(_message_options())
        super().add_command(cmd, name)


def run_group(group: click.Group) -> int:
    """Run the command line's command.

    Returns:
        The exit code; click's own errors have been reported.

    Raises:
        Stopped: If a prompt was answered with Ctrl-C.
    """
    try:
        code = group.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort as error:
        raise Stopped(signal.SIGINT) from error
    return code if isinstance(code, int) else 0


def _message_options() -> list[click.Parameter]:
    shared: dict[str, Any] = {"is_eager": True, "expose_value": False}
    return [
        click.Option(
            ["-v", "--verbose"], is_flag=True, callback=_set_verbosity,
            help="Also show messages of vLLM, torch and others, with time stamps.", **shared,
        ),
        click.Option(
            ["-q", "--quiet"], is_flag=True, callback=_set_verbosity,
            help="Show only warnings and errors.", **shared,
        ),
        click.Option(
            ["--log-file"], type=click.Path(path_type=Path, dir_okay=False), callback=_set_log_file,
            help="Append all messages, those of vLLM and others too, with time stamps.",
            **shared,
        ),
        click.Option(
            ["--debug"], is_flag=True, callback=_set_debug,
            help="Show the traceback of an error.", **shared,
        ),
    ]  # fmt: skip


def _set_verbosity(ctx: click.Context, param: click.Parameter, is_set: bool) -> None:
    program = messages.program_messages()
    if is_set and program is not None:
        program.set_verbosity(quiet=param.name == "quiet", verbose=param.name == "verbose")


def _set_log_file(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    program = messages.program_messages()
    if path is None or program is None:
        return
    try:
        program.set_log_file(path)
    except OSError as error:
        raise click.BadParameter(f"cannot be written: {error}", ctx, param) from error


def _set_debug(ctx: click.Context, param: click.Parameter, is_set: bool) -> None:
    program = messages.program_messages()
    if program is not None:
        program.is_debugging = is_set
