"""`train-student rollout`."""

import json
from dataclasses import asdict, replace

import click

from student_train.cli.early_checks import check_rollout
from student_train.rounds.rollout import roll_out
from student_train.rounds.rollout_config import RolloutConfig
from student_train.run.folder import student_of
from teacher_cache.terminal.commands import config_command, json_option


@config_command("rollout", RolloutConfig)
@json_option
def rollout_command(config: RolloutConfig, as_json: bool) -> None:
    """Let a student write traces of its own.

    \b
    Example:
      train-student rollout --model run --prompts prompts.jsonl --out rollouts.jsonl
      cache-teacher score --model Qwen/Qwen3-32B --traces rollouts.jsonl --out own
      train-student run --cache own --student run/model --out run-2 --sections cot,answer
    """
    config = replace(config, model=student_of(config.model))
    check_rollout(config)
    result = roll_out(config)
    click.echo(json.dumps(asdict(result)) if as_json else f"{config.out}: {result}")
