"""generate, score, seal: captures and their reports."""

import sys
from dataclasses import dataclass
from pathlib import Path

import click

from teacher_cache.capture.configs import GenerateConfig, ScoreConfig
from teacher_cache.capture.generate import generate
from teacher_cache.capture.run import CaptureReport
from teacher_cache.capture.score import score
from teacher_cache.capture.survey_table import remove_survey_tables
from teacher_cache.cli import report_text
from teacher_cache.format import CachePath, open_cache, seal_cache, shown
from teacher_cache.terminal.commands import config_command
from teacher_cache.terminal.early_checks import check_cache
from teacher_cache.terminal.option import check_options, option
from teacher_cache.terminal.progress import Progress


@config_command("generate", GenerateConfig)
def generate_command(config: GenerateConfig) -> None:
    """Let the teacher answer prompts; run again to resume.

    \b
    cache-teacher generate --model Qwen/Qwen3-32B --prompts prompts.jsonl --out cache
    """
    _say_report(generate(config), config.out)


@config_command("score", ScoreConfig)
def score_command(config: ScoreConfig) -> None:
    """Keep the teacher's distributions over existing traces.

    \b
    cache-teacher score --model Qwen/Qwen3-32B --traces traces.jsonl --out cache
    """
    _say_report(score(config), config.out)


@dataclass(frozen=True, kw_only=True)
class SealConfig:
    """`cache-teacher seal`."""

    cache: CachePath = option("Folder or URI of the cache.", is_argument=True)
    journal: Path | None = option(
        "Folder of its journals, if the capture used one.",
        default=None,
        unset="in the cache's folder",
    )
    allow_missing: bool = option(
        "Seal even if workers have not finished their share of the input.", default=False
    )

    def __post_init__(self) -> None:
        check_options(self)


@config_command("seal", SealConfig)
def seal_command(config: SealConfig) -> None:
    """Declare a cache complete as it is.

    For trial runs (--limit), and for separate workers that have all finished.

    \b
    cache-teacher seal cache
    """
    check_cache(config.cache)
    with Progress(f"sealing {shown(config.cache)}", unit="shards") as progress:
        manifest = seal_cache(
            config.cache,
            journal=config.journal,
            allow_missing=config.allow_missing,
            on_record=lambda done, total: progress.set(done, total=total),
        )
    remove_survey_tables(config.cache)
    seal = manifest.seal
    if seal is not None:
        click.echo(
            f"{shown(config.cache)}: sealed, {seal.num_traces:,} traces, {seal.num_tokens:,} tokens"
        )


def _say_report(report: CaptureReport, out: CachePath) -> None:
    if report.stopped_by:
        click.echo(report_text.stopped_line(report, shown(out)), err=True)
        sys.exit(128 + report.stopped_by)
    click.echo(report_text.report_line(report, shown(out)))
    if report.survey.num_taken < report.survey.num_wanted and report.num_traces:
        cache = open_cache(out, allow_unsealed=True)
        click.echo(report_text.estimate_line(report, cache))
