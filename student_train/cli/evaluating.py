"""`train-student evaluate`."""

import json
from dataclasses import asdict, replace

import click

from student_train.cli.early_checks import check_evaluate
from student_train.evaluation.config import EvaluateConfig
from student_train.evaluation.evaluate import evaluate
from student_train.run.folder import student_of
from teacher_cache.terminal.commands import config_command, json_option


@config_command("evaluate", EvaluateConfig)
@json_option
def evaluate_command(config: EvaluateConfig, as_json: bool) -> None:
    """Generate answers and compare them with the right ones.

    \b
    Example:
      train-student evaluate --model run/model --prompts held-out.jsonl --max-new-tokens 512
    """
    config = replace(config, model=student_of(config.model))
    check_evaluate(config)
    result = evaluate(config)
    click.echo(json.dumps(asdict(result)) if as_json else str(result))
