"""`train-student sweep`."""

import sys

import click

from student_train.cli.early_checks import check_sweep
from student_train.sweep.config import SweepConfig
from teacher_cache.terminal.commands import config_command
from teacher_cache.terminal.progress import Progress


@config_command("sweep", SweepConfig)
def sweep_command(config: SweepConfig) -> None:
    """Measure how much of each trace a student needs.

    It trains and evaluates a student per lead span and seed, and reports quality against cost.

    \b
    Example:
      train-student sweep --cache cache --student Qwen/Qwen3-0.6B --out sweep \\
        --eval-prompts held-out.jsonl --lead-spans 0.1,0.25,0.5,0.75,1.0 --num-seeds 3

    Every combination of the lists is a cell. Run it again to resume, or with other lists to add
    cells: OUT/results.csv and report.html show everything that the folder holds.
    """
    check_sweep(config)
    with Progress("loading torch"):
        from student_train.sweep.protocol import run_sweep

    result = run_sweep(config)
    click.echo(f"{config.out / 'report.html'}: {result.num_finished} cells of this call finished")
    click.echo(result.answer)
    for name in result.failed:
        click.echo(f"train-student: cell {name} failed", err=True)
    if result.failed:
        sys.exit(1)
