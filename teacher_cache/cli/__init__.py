"""cache-teacher: options and messages, nothing else."""

# The program's name, its commands, and the extras that install what they import.
COMMAND_LINE = ("cache-teacher", "teacher_cache.cli.group:cli", ("teacher", "cpu"))


def program() -> None:
    """Entry point of the installed command; ends the process."""
    from teacher_cache.terminal.first import stop_at_once

    stop_at_once(COMMAND_LINE[0])
    from teacher_cache.terminal.entry import CommandLine, run_program

    run_program(CommandLine(*COMMAND_LINE))
