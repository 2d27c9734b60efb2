"""`train-student rounds`."""

import click

from student_train.cli.early_checks import check_rounds
from student_train.rounds.config import RoundsConfig
from student_train.rounds.rounds import run_rounds
from teacher_cache.terminal.commands import config_command


@config_command("rounds", RoundsConfig)
def rounds_command(config: RoundsConfig) -> None:
    """Train a student on its own traces, in rounds.

    A round is a rollout, its scoring, a training run and an evaluation: commands that can be run
    alone, and are printed. Run it again to resume at any point.

    \b
    Example:
      train-student rounds --student run/model --teacher Qwen/Qwen3-32B --out rounds \\
        --prompts prompts.jsonl --eval-prompts held-out.jsonl --run-options run.toml
    """
    check_rounds(config)
    result = run_rounds(config)
    click.echo(result.table)
    click.echo(f"{result.report}; the last student is {result.student}")
