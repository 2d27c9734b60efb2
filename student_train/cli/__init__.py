"""train-student: options and messages. Loads torch only when a command runs."""

from typing import NoReturn

from teacher_cache.terminal.entry import CommandLine, run_program

COMMAND_LINE = CommandLine("train-student", "student_train.cli.group:cli", ("student",))


def main() -> NoReturn:
    """What the installed command runs."""
    run_program(COMMAND_LINE)
