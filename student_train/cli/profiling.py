"""`train-student profile`."""

import json

import click

from student_train.cli.early_checks import check_profile
from student_train.profile.config import ProfileConfig
from teacher_cache.terminal.commands import config_command, json_option
from teacher_cache.terminal.progress import Progress


@config_command("profile", ProfileConfig)
@json_option
def profile_command(config: ProfileConfig, as_json: bool) -> None:
    """Show where in the traces a student has most to learn.

    One forward pass over some traces tells how much of the student's divergence from the teacher
    lies before each lead span, and which traces and teachers suit it.

    \b
    Example:
      train-student profile --cache cache --student Qwen/Qwen3-0.6B --out profile
    """
    check_profile(config)
    with Progress("loading torch"):
        from student_train.profile.profile import profile

    result = profile(config)
    if as_json:
        click.echo(json.dumps(result.tables))
        return
    click.echo(result.advice.sentence)
    if len(config.cache) > 1:
        click.echo("Caches by rank-surprisal ratio, the most suitable for this student first:")
        for row in result.tables["caches"]:
            ratio = row["rank_surprisal_ratio"]
            click.echo(f"  {'none' if ratio is None else f'{ratio:.3f}'}  {row['cache']}")
    click.echo(f"{config.out}: profile.json, profile.html, traces.jsonl")
