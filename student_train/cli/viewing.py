"""`train-student view`."""

import click

from student_train.cli.early_checks import check_view
from student_train.view.config import StudentViewConfig
from teacher_cache.pages.numbers import byte_count
from teacher_cache.terminal.commands import config_command
from teacher_cache.terminal.escape import printable
from teacher_cache.terminal.progress import Progress


@config_command("view", StudentViewConfig)
def view_command(config: StudentViewConfig) -> None:
    """Write a page of teacher and student, token by token.

    Tokens are coloured by the KL from teacher to student, and the fifty worst are listed by
    section. `cache-teacher view` shows the teacher alone.

    \b
    Example:
      train-student view cache --student run -o page.html
    """
    check_view(config)
    with Progress("loading torch"):
        from student_train.view.view import write_view

    with Progress("viewing"):
        size_bytes = write_view(config)
    click.echo(f"{printable(config.out)}: {byte_count(size_bytes)}, opens in any browser")
