"""inspect, export, truncate, retokenize: commands for an existing cache."""

import json
import sys
from typing import TYPE_CHECKING

import click

from teacher_cache.capture.early_checks import check_input
from teacher_cache.cli import report_text
from teacher_cache.engines import EngineError
from teacher_cache.examine import inspection
from teacher_cache.examine.figures_page import figures_page
from teacher_cache.examine.inspection import InspectConfig
from teacher_cache.format import CacheError, CacheHeader, open_cache, shown
from teacher_cache.format.files import publish
from teacher_cache.sources import Input
from teacher_cache.terminal.commands import config_command, json_option
from teacher_cache.terminal.early_checks import (
    check_cache,
    check_model,
    check_out_cache,
    check_out_file,
)
from teacher_cache.terminal.escape import printable
from teacher_cache.terminal.progress import Progress
from teacher_cache.transform.export import ExportConfig, export
from teacher_cache.transform.retokenize.configs import RetokenizeConfig
from teacher_cache.transform.truncate import TruncateConfig, truncate_cache

_FEW_CHARACTERS = 1500  # of each section of a trace that nobody asked for

if TYPE_CHECKING:
    from teacher_cache.sources.tokenizer import TeacherTokenizer


@config_command("inspect", InspectConfig)
@json_option
def inspect_command(config: InspectConfig, as_json: bool) -> None:
    """Show what is inside a cache, and one trace as text.

    \b
    cache-teacher inspect cache --trace gsm8k-17
    cache-teacher inspect cache --trace gsm8k-17 --tokens 100:140
    cache-teacher inspect cache --shards 0 --html cache.html
    """
    if as_json and (config.trace, config.tokens, config.model) != (None, None, None):
        raise ValueError("--json: the cache's figures alone; leave out --trace, --tokens, --model")
    check_cache(config.cache)
    if config.html is not None:
        check_out_file(config.html, "--html", force=config.force)
    opened = open_cache(config.cache, allow_unsealed=True)
    # Before anything is shown: id or range may be wrong.
    if config.trace is None:
        trace = next(opened.read_held(opened.traces[:1]), None)
    else:
        trace = opened[config.trace]
    if trace is not None and config.tokens is not None and config.tokens[0] >= len(trace):
        raise ValueError(
            f"--tokens {config.tokens[0]}: the cache holds {len(trace):,} tokens of this trace"
        )
    with Progress(f"inspecting {shown(config.cache)}"):
        figures = inspection.inspect_cache(opened, config.shards)
    if config.html is not None:
        publish(config.html, figures_page(opened, figures))
    if as_json:
        click.echo(json.dumps(inspection.to_json(figures, opened.header)))
        return
    header = opened.header.to_json()
    can_draw = sys.stdout.isatty() and (sys.stdout.encoding or "").lower().startswith("utf")
    for line in report_text.figures_lines(figures, header, opened.path, can_draw=can_draw):
        click.echo(line)
    if trace is None:
        return
    tokenizer = tokenizer_to_show(opened.header, config.model)
    limit = _FEW_CHARACTERS if config.trace is None else None
    texts = inspection.section_texts(trace, tokenizer)
    for line in report_text.trace_lines(trace, texts, limit=limit):
        click.echo(line)
    if config.tokens is not None:
        click.echo()
        for token in inspection.show_tokens(
            trace, tokenizer, config.tokens, has_tails=opened.header.has_tails
        ):
            click.echo(report_text.token_line(token))


@config_command("export", ExportConfig)
def export_command(config: ExportConfig) -> None:
    """Write traces as JSONL, as `score` reads them, or Parquet.

    \b
    cache-teacher export cache traces.jsonl
    cache-teacher export cache look.jsonl --limit 3 --lead-span 0.1 --text --logprobs
    cache-teacher export cache tokens.parquet --parquet
    cache-teacher export cache rows.parquet --axolotl
    """
    check_cache(config.cache)
    check_out_file(config.out, "OUT", force=config.force)
    with Progress("exported", unit="traces") as progress:
        num_traces = export(config, lambda done, total: progress.set(done, total=total))
    click.echo(f"{printable(config.out)}: {num_traces:,} traces")


@config_command("truncate", TruncateConfig)
def truncate_command(config: TruncateConfig) -> None:
    """Write a smaller cache: a lead span, or fewer entries.

    \b
    cache-teacher truncate cache half --lead-span 0.5 --top-k 16
    cache-teacher truncate cache mixed --lead-span 0.375:4,1:1 --seed 0
    """
    check_cache(config.cache)
    check_out_cache(config.out, "OUT")
    with Progress("truncated", unit="traces") as progress:
        manifest = truncate_cache(
            open_cache(config.cache),
            config.out,
            lead_span=config.lead_span,
            seed=config.seed or 0,
            top_k=config.top_k,
            on_trace=lambda done, total: progress.set(done, total=total),
        )
    seal = manifest.seal
    if seal is not None:
        click.echo(
            f"{shown(config.out)}: sealed, {seal.num_traces:,} traces, {seal.num_tokens:,} tokens"
        )


@config_command("retokenize", RetokenizeConfig)
def retokenize_command(config: RetokenizeConfig) -> None:
    """Write a cache for a student with another tokenizer.

    \b
    cache-teacher retokenize cache student-cache --student meta-llama/Llama-3.1-8B \\
        --rows prompts.jsonl
    """
    check_cache(config.cache)
    check_out_cache(config.out, "OUT")
    check_model(config.student, "--student")
    if config.rows is not None:
        check_input(Input(config.rows, config.dataset_config, config.split))
    from teacher_cache.transform.retokenize.run import retokenize

    report = retokenize(config)
    for line in report_text.retokenized_lines(report, shown(config.out)):
        click.echo(line, err=report.stopped_by is not None)
    if report.stopped_by is not None:
        sys.exit(128 + report.stopped_by)


def tokenizer_to_show(header: CacheHeader, model: str | None) -> "TeacherTokenizer | None":
    """The teacher's tokenizer; without one, ids are shown instead of text."""
    from teacher_cache.sources.tokenizer import load_tokenizer

    try:
        return load_tokenizer(header, model)
    except (EngineError, CacheError, ModuleNotFoundError) as error:
        if model is not None:
            raise
        click.echo(f"token ids instead of text ({error}); name the teacher's folder with --model")
        return None
