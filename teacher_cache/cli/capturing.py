"""generate, score, seal: the options of a capture and what is said of it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from teacher_cache.capture.configs import GenerateConfig, ScoreConfig
from teacher_cache.capture.generate import generate
from teacher_cache.capture.run import CaptureReport
from teacher_cache.capture.score import score
from teacher_cache.cli import report_text
from teacher_cache.cli.options import FILE, FOLDER, NamedValue, named, read_config
from teacher_cache.cli.source_options import source_options, trace_options
from teacher_cache.engines.start import ENGINES
from teacher_cache.format import open_cache, seal_cache, shown

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _capture_options(command: _Command) -> _Command:
    """The options that both ways of capturing have; their fields are in CaptureConfig."""
    default = GenerateConfig
    options = [
        click.option("--model", required=True, help="Teacher: a folder or a Hugging Face id."),
        click.option(
            "--out", required=True, help="The cache: a folder, or a URI (s3://, gs://, hdfs://)."
        ),
        click.option(
            "--engine", type=click.Choice(ENGINES), default=default.engine, show_default=True
        ),
        click.option(
            "--top-k",
            type=int,
            default=default.top_k,
            show_default=True,
            help="Entries kept per token, at most.",
        ),
        click.option(
            "--mass",
            type=float,
            default=default.mass,
            show_default=True,
            help="Keep the fewest entries with this mass.",
        ),
        click.option("--revision", help="Branch, tag or commit of a hub id."),
        click.option("--dtype", default=default.dtype, show_default=True),
        click.option("--max-model-len", type=click.IntRange(2), help="Tokens per trace, at most."),
        click.option(
            "--engine-arg",
            type=NamedValue(),
            multiple=True,
            callback=named,
            help="An engine argument of vLLM, e.g. max_num_seqs=128. Repeatable.",
        ),
        click.option(
            "--template-arg",
            type=NamedValue(),
            multiple=True,
            callback=named,
            help="An argument of the chat template, e.g. enable_thinking=true. Repeatable.",
        ),
        click.option("--think-open", default=default.think_open, show_default=True),
        click.option("--think-close", default=default.think_close, show_default=True),
        click.option(
            "--num-bands",
            type=click.IntRange(1, 255),
            default=default.num_bands,
            show_default=True,
            help="Slices per trace: lead spans are read in steps of 1/N.",
        ),
        click.option(
            "--limit",
            type=click.IntRange(1),
            help="Capture only so many traces, and estimate the whole.",
        ),
        click.option(
            "--worker",
            default=default.worker,
            show_default=True,
            help="i/n: share the input among n such commands, i counting from 0, e.g. "
            "$SLURM_ARRAY_TASK_ID/8. Or a name, for a process with an input of its own.",
        ),
        click.option(
            "--workers",
            type=click.IntRange(1),
            default=default.workers,
            show_default=True,
            help="Engine replicas that Ray places, on this machine or with --ray-address.",
        ),
        click.option(
            "--ray-address", help="A Ray cluster that runs: auto, HOST:PORT or ray://HOST:PORT."
        ),
        click.option(
            "--tensor-parallel-size",
            type=click.IntRange(1),
            default=default.tensor_parallel_size,
            show_default=True,
            help="GPUs per replica.",
        ),
        click.option(
            "--journal",
            type=FOLDER,
            help="Local folder for traces that do not fill a shard yet, of this cache alone.",
        ),
        click.option(
            "--config",
            type=FILE,
            is_eager=True,
            expose_value=False,
            callback=read_config,
            help="TOML file with defaults for these options.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command("generate")
@click.option(
    "--prompts",
    required=True,
    type=FILE,
    help="File, folder or hub id; rows with `messages`, `conversations` or `prompt`. A last turn "
    "of the assistant is answered anew.",
)
@_capture_options
@source_options
@click.option("--temperature", type=click.FloatRange(0), help="Default: the model's own.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Default: the model's.")
@click.option("--sample-top-k", type=click.IntRange(0), help="The sampler's cut-off; 0 for none.")
@click.option("--max-tokens", type=click.IntRange(1), help="New tokens per trace, at most.")
@click.option(
    "--stop-at-tokens",
    type=click.IntRange(2),
    help="Tokens per trace, at most, the prompt included: what a student with --max-tokens reads.",
)
@click.option("--seed", type=int, default=GenerateConfig.seed, show_default=True)
@click.option(
    "--samples-per-prompt",
    type=click.IntRange(1),
    default=GenerateConfig.samples_per_prompt,
    show_default=True,
)
@click.option(
    "--capture-prompt/--no-capture-prompt",
    default=GenerateConfig.capture_prompt,
    show_default=True,
    help="Keep distributions over the prompt's tokens too.",
)
def generate_command(**options: Any) -> None:  # noqa: ANN401 (click's own values)
    """Let the teacher answer prompts; a run that was stopped goes on where it stood.

    \b
    cache-teacher generate --model Qwen/Qwen3-32B --prompts prompts.jsonl --out cache
    """
    _say_report(generate(GenerateConfig(**options)), options["out"])


@click.command("score")
@click.option(
    "--traces",
    required=True,
    type=FILE,
    help="File, folder or hub id; rows with `messages`, `conversations`, `prompt` and `response`, "
    "or `token_ids`.",
)
@_capture_options
@source_options
@trace_options
@click.option(
    "--capture-prompt/--no-capture-prompt",
    default=ScoreConfig.capture_prompt,
    show_default=True,
    help="Keep distributions over the prompt's tokens too.",
)
def score_command(**options: Any) -> None:  # noqa: ANN401 (click's own values)
    """Keep the teacher's distributions over traces that exist already.

    \b
    cache-teacher score --model Qwen/Qwen3-32B --traces traces.jsonl --out cache
    """
    _say_report(score(ScoreConfig(**options)), options["out"])


@click.command("seal")
@click.argument("cache")
@click.option("--journal", type=FOLDER, help="Where its journals are, if the capture was told so.")
@click.option("--allow-missing", is_flag=True, help="Seal though workers have not finished.")
def seal_command(cache: str, journal: Path | None, allow_missing: bool) -> None:
    """Declare a cache complete as it is, after a trial run or when workers ran apart.

    \b
    cache-teacher seal cache
    """
    seal = seal_cache(cache, journal=journal, allow_missing=allow_missing).seal
    if seal is not None:
        click.echo(
            f"{shown(cache)}: sealed, {seal.num_traces:,} traces, {seal.num_tokens:,} tokens"
        )


def _say_report(report: CaptureReport, out: str) -> None:
    if report.stopped_by:
        click.echo(report_text.stopped_line(report, shown(out)), err=True)
        sys.exit(128 + report.stopped_by)
    click.echo(report_text.report_line(report, shown(out)))
    if report.survey.num_taken < report.survey.num_wanted and report.num_traces:
        cache = open_cache(out, allow_unsealed=True)
        click.echo(report_text.estimate_line(report, cache))
