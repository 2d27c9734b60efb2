"""`train-student evaluate`."""

import json
from dataclasses import asdict

import click

from student_train.evaluation.config import EvaluateConfig
from teacher_cache.terminal.commands import config_command, json_option


@config_command("evaluate", EvaluateConfig)
@json_option
def evaluate_command(config: EvaluateConfig, as_json: bool) -> None:
    """Generate answers and compare them with the right ones.

    \b
    Example:
      train-student evaluate --model run/model --prompts held-out.jsonl --max-new-tokens 512
    """
    from student_train.evaluation.evaluate import evaluate

    result = evaluate(config)
    click.echo(json.dumps(asdict(result)) if as_json else str(result))
