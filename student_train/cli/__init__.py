"""train-student: options and messages. Loads torch only when a command runs."""

# The program's name, its commands, and the extras with their imports.
COMMAND_LINE = ("train-student", "student_train.cli.group:cli", ("student",))


def main() -> None:
    """Entry point of the installed command; ends the process."""
    from teacher_cache.terminal.first import stop_at_once

    stop_at_once(COMMAND_LINE[0])
    from teacher_cache.terminal.entry import CommandLine, run_program

    run_program(CommandLine(*COMMAND_LINE))
