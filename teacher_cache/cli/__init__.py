"""cache-teacher: options and messages, nothing else."""

from typing import NoReturn

from teacher_cache.terminal.entry import CommandLine, run_program

COMMAND_LINE = CommandLine("cache-teacher", "teacher_cache.cli.group:cli", ("teacher", "cpu"))


def program() -> NoReturn:
    """What the installed command runs."""
    run_program(COMMAND_LINE)
