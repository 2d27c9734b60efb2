"""`train-student evaluate`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from student_train.cli.options import config_option
from student_train.evaluation.config import ENGINES, EvaluateConfig


@click.command("evaluate")
@config_option
@click.option("--model", required=True, help="Model folder or hub id.")
@click.option(
    "--prompts", required=True, type=click.Path(path_type=Path),
    help="JSONL with `prompt` or `messages`, and `answer`.",
)  # fmt: skip
@click.option(
    "--cache", default=EvaluateConfig.cache,
    help="Cache of held-out traces: KL to the teacher and NLL on all of each, by section.",
)  # fmt: skip
@click.option(
    "--engine", type=click.Choice(ENGINES), default=EvaluateConfig.engine,
    help="What generates; vllm must be installed, and pays for many prompts or a large student.",
)  # fmt: skip
@click.option(
    "--samples", type=int, default=EvaluateConfig.samples,
    help="Answers per prompt, for avg@n; needs a temperature.",
)  # fmt: skip
@click.option(
    "--max-tokens", type=int, default=EvaluateConfig.max_tokens,
    help="Tokens to generate at most; a longer answer counts as unfinished.",
)  # fmt: skip
@click.option(
    "--batch-size",
    type=int,
    default=EvaluateConfig.batch_size,
    help="Prompts per batch of transformers.",
)
@click.option(
    "--limit", type=int, default=EvaluateConfig.limit, help="Use the first so many prompts."
)
@click.option(
    "--temperature", type=float, default=EvaluateConfig.temperature,
    help="Of sampling; 0 takes the likeliest token.",
)  # fmt: skip
@click.option(
    "--top-p", type=float, default=EvaluateConfig.top_p,
    help="Sample from the likeliest tokens with this probability.",
)  # fmt: skip
@click.option("--seed", type=int, default=EvaluateConfig.seed, help="Of sampling.")
@click.option(
    "--think-close", default=EvaluateConfig.think_close,
    help="The answer is what follows the last of this mark.",
)  # fmt: skip
@click.option(
    "--group-by", default=EvaluateConfig.group_by,
    help="Field of the prompts by which accuracy is told apart.",
)  # fmt: skip
@click.option(
    "--completions", type=click.Path(path_type=Path), default=EvaluateConfig.completions,
    help="Write every completion and its verdict to this JSONL file.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate_command(as_json: bool, **options: Any) -> None:  # noqa: ANN401  # EvaluateConfig's
    """Generate answers and compare them with the right ones.

    \b
    Example:
      train-student evaluate --model run/model --prompts held-out.jsonl --max-tokens 512
    """
    config = EvaluateConfig(**options)
    from student_train.evaluation.evaluate import evaluate

    result = evaluate(config)
    click.echo(json.dumps(asdict(result)) if as_json else str(result))
