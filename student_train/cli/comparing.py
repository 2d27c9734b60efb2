"""`train-student compare`."""

import click

from student_train.compare.config import CompareConfig
from student_train.compare.page import compare
from teacher_cache.pages.numbers import byte_count
from teacher_cache.terminal.commands import config_command
from teacher_cache.terminal.early_checks import check_out_file
from teacher_cache.terminal.escape import printable
from teacher_cache.terminal.progress import Progress


@config_command("compare", CompareConfig)
def compare_command(config: CompareConfig) -> None:
    """Write a page that sets runs beside each other.

    It has curves, answers that flipped and settings that differ.

    Answers are taken from completions.jsonl in each run's folder, which
    `train-student evaluate --completions` writes.

    \b
    Example:
      train-student compare run-1.0 run-0.5 -o compare.html
    """
    check_out_file(config.out, "--out", force=config.force)
    with Progress("comparing"):
        size_bytes = compare(config)
    click.echo(f"{printable(config.out)}: {byte_count(size_bytes)}, opens in any browser")
