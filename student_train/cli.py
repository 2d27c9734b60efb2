"""`train-student`: options and nothing else. Loads torch only when a command runs."""

import json
import logging
import sys
import tomllib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from student_train.config import DTYPES, NORMALISATIONS, SCHEDULES, EvaluateConfig, TrainConfig
from student_train.errors import InterruptedRunError, NonFiniteLossError
from teacher_cache.format import CacheError


def split_names(
    ctx: click.Context, param: click.Parameter, value: str | list[str]
) -> tuple[str, ...]:
    """Split `a,b`; a TOML list comes as it is. Which names there are, the configuration says."""
    names = value.split(",") if isinstance(value, str) else value
    return tuple(name.strip() for name in names)


def read_defaults(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Take a command's defaults from a TOML file of its option names."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise click.BadParameter(f"{path}: not TOML: {error}", ctx, param) from error
    values = {name.replace("-", "_"): value for name, value in values.items()}
    known = {item.name for item in ctx.command.params} - {param.name, "json"}
    unknown = sorted(set(values) - known)
    if unknown:
        raise click.BadParameter(
            f"{path}: no option {unknown[0]!r}; there are {', '.join(sorted(known))}", ctx, param
        )
    ctx.default_map = values
    return path


def config_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --config."""
    return click.option(
        "--config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        callback=read_defaults,
        is_eager=True,
        expose_value=False,
        help="TOML file with defaults for these options, by their names.",
    )(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="leadspan")
def cli() -> None:
    """Train students on a cached teacher, and see what they can do."""


@cli.command("run")
@config_option
@click.option("--cache", required=True, help="Cache folder or URI, made by cache-teacher.")
@click.option("--student", required=True, help="Model folder or hub id to start from.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path),
    help="Folder of the run; goes on from the checkpoint it holds.",
)  # fmt: skip
@click.option(
    "--student-revision", default=TrainConfig.student_revision,
    help="Revision of the student's hub repository.",
)  # fmt: skip
@click.option(
    "--allow-unsealed", is_flag=True, default=TrainConfig.allow_unsealed,
    help="Train on the shards committed so far of a capture that is not complete.",
)  # fmt: skip
@click.option(
    "--lead-span", type=float, default=TrainConfig.lead_span,
    help="Proportion of every trace to train on, from its start, in (0, 1].",
)  # fmt: skip
@click.option(
    "--max-tokens", type=int, default=TrainConfig.max_tokens,
    help="Number of tokens of every trace to train on, instead of a lead span.",
)  # fmt: skip
@click.option(
    "--sections", type=click.UNPROCESSED, callback=split_names,
    default=",".join(TrainConfig.sections),
    help="Sections whose tokens enter the loss, of prompt,cot,answer.",
)  # fmt: skip
@click.option(
    "--top-k", type=int, default=TrainConfig.top_k,
    help="Use at most so many of the cached entries of every token; all of them otherwise.",
)  # fmt: skip
@click.option(
    "--mass", type=float, default=TrainConfig.mass,
    help="Use the fewest cached entries of every token that reach this probability.",
)  # fmt: skip
@click.option(
    "--ce-weight", type=float, default=TrainConfig.ce_weight,
    help="Share w of the cross entropy: loss = (1 - w) KL + w CE.",
)  # fmt: skip
@click.option(
    "--normalise", type=click.Choice(NORMALISATIONS), default=TrainConfig.normalise,
    help="What weighs the same in a step: every valid token or every trace.",
)  # fmt: skip
@click.option("--lr", type=float, default=TrainConfig.lr, help="Peak learning rate of AdamW.")
@click.option(
    "--schedule", type=click.Choice(SCHEDULES), default=TrainConfig.schedule,
    help="Course of the learning rate after warm-up.",
)  # fmt: skip
@click.option(
    "--warmup", type=float, default=TrainConfig.warmup,
    help="Proportion of all steps in which the learning rate rises from 0.",
)  # fmt: skip
@click.option(
    "--weight-decay", type=float, default=TrainConfig.weight_decay,
    help="AdamW's, on matrices only.",
)  # fmt: skip
@click.option(
    "--clip-norm", type=float, default=TrainConfig.clip_norm,
    help="Largest norm of the gradient; 0 does not clip.",
)  # fmt: skip
@click.option(
    "--epochs", type=int, default=TrainConfig.epochs, help="Times that every trace is seen."
)
@click.option(
    "--max-steps", type=int, default=TrainConfig.max_steps,
    help="End after so many steps, if the epochs have not ended before.",
)  # fmt: skip
@click.option(
    "--batch-traces", type=int, default=TrainConfig.batch_traces,
    help="Traces per step, over all processes.",
)  # fmt: skip
@click.option(
    "--batch-tokens", type=int, default=TrainConfig.batch_tokens,
    help="Cap of padded tokens per forward pass; lower it when memory runs out.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(DTYPES), default=TrainConfig.dtype,
    help="Precision of the matrix products; weights are float32.",
)  # fmt: skip
@click.option(
    "--gradient-checkpointing", is_flag=True, default=TrainConfig.gradient_checkpointing,
    help="Compute activations twice instead of keeping them.",
)  # fmt: skip
@click.option(
    "--lanes", type=int, default=TrainConfig.lanes,
    help="Lanes of the order; a multiple of the number of processes.",
)  # fmt: skip
@click.option("--seed", type=int, default=TrainConfig.seed, help="Of order and dropout.")
@click.option(
    "--save-every", type=int, default=TrainConfig.save_every, help="Steps between checkpoints."
)
@click.option(
    "--log-every", type=int, default=TrainConfig.log_every,
    help="Steps between lines of metrics.jsonl.",
)  # fmt: skip
def run_command(**options: Any) -> None:  # noqa: ANN401  # mirrors TrainConfig
    """Distil a cached teacher into a student.

    \b
    Example:
      train-student run --cache cache --student Qwen/Qwen3-0.6B --out run --lead-span 0.5

    Run it again to go on after an interruption. RUN/model is the finished student. Start it with
    `accelerate launch -m student_train.cli run ...` to use several devices.
    """
    config = TrainConfig(**options)
    from student_train.loop import train

    result = train(config)
    if result.was_finished:
        click.echo(f"{config.out} is finished already; nothing was done", err=True)
    click.echo(
        f"{result.model}: {result.num_steps:,} steps, loss {result.metrics['loss']:.4f}, "
        f"{result.metrics['bytes_read']:,} bytes read"
    )


@cli.command("evaluate")
@config_option
@click.option("--model", required=True, help="Model folder or hub id.")
@click.option(
    "--prompts", required=True, type=click.Path(path_type=Path),
    help="JSONL with `prompt` or `messages`, and `answer`.",
)  # fmt: skip
@click.option(
    "--max-tokens", type=int, default=EvaluateConfig.max_tokens,
    help="Tokens to generate at most; a longer answer counts as unfinished.",
)  # fmt: skip
@click.option(
    "--batch-size", type=int, default=EvaluateConfig.batch_size, help="Prompts per batch."
)
@click.option(
    "--limit", type=int, default=EvaluateConfig.limit, help="Use the first so many prompts."
)
@click.option(
    "--temperature", type=float, default=EvaluateConfig.temperature,
    help="Of sampling; 0 takes the likeliest token.",
)  # fmt: skip
@click.option("--seed", type=int, default=EvaluateConfig.seed, help="Of sampling.")
@click.option(
    "--think-close", default=EvaluateConfig.think_close,
    help="The answer is what follows the last of this mark.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate_command(as_json: bool, **options: Any) -> None:  # noqa: ANN401  # EvaluateConfig's
    """Generate answers and compare them with the right ones.

    \b
    Example:
      train-student evaluate --model run/model --prompts held-out.jsonl --max-tokens 512
    """
    config = EvaluateConfig(**options)
    from student_train.evaluate import evaluate

    result = evaluate(config)
    click.echo(json.dumps(asdict(result)) if as_json else str(result))


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("transformers", "httpx", "torch"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except InterruptedRunError as error:
        click.echo(f"train-student: {error}", err=True)
        sys.exit(128 + error.signal_number)
    except ModuleNotFoundError as error:
        click.echo(
            f"train-student: {error.name} is not installed; pip install 'leadspan[student]'",
            err=True,
        )
        sys.exit(1)
    except (CacheError, NonFiniteLossError, ValueError, OSError) as error:
        click.echo(f"train-student: {' '.join(str(error).split())}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
