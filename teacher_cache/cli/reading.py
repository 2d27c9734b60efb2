"""inspect, export, truncate: what can be done with a cache that is there."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from teacher_cache.cli import report_text
from teacher_cache.cli.options import FILE
from teacher_cache.engines import EngineError
from teacher_cache.examine import inspection
from teacher_cache.format import CacheError, CacheHeader, open_cache, shown

if TYPE_CHECKING:
    from teacher_cache.sources.tokenizer import TeacherTokenizer


@click.command("inspect")
@click.argument("cache")
@click.option("--trace", "trace_id", help="Show this trace; the first one otherwise.")
@click.option("--model", help="Where the teacher's tokenizer is now, to show text.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, without the text.")
def inspect_command(cache: str, trace_id: str | None, model: str | None, as_json: bool) -> None:
    """Show what is inside a cache: provenance, counts, sizes, and one trace as text.

    \b
    cache-teacher inspect cache --trace gsm8k-17
    """
    opened = open_cache(cache, allow_unsealed=True)
    traces = inspection.read_first_shard(opened)
    figures = inspection.inspect_cache(opened, traces)
    if as_json:
        click.echo(json.dumps(inspection.to_json(figures, opened.header)))
        return
    for line in report_text.figures_lines(figures, opened.header.to_json(), opened.path):
        click.echo(line)
    if not traces:
        return
    trace = traces[0] if trace_id is None else inspection.find_trace(opened, trace_id)
    tokenizer = _tokenizer_to_show(opened.header, model)
    click.echo(f"\ntrace {trace.trace_id} ({trace.finish_reason}) {json.dumps(dict(trace.fields))}")
    for token in inspection.show_tokens(trace, tokenizer):
        click.echo(report_text.token_line(token))


@click.command("export")
@click.argument("cache")
@click.argument("out", type=FILE)
@click.option("--text", is_flag=True, help="Add each trace's text (JSONL only).")
@click.option("--model", help="Where the teacher's tokenizer is now, for --text.")
@click.option("--allow-unsealed", is_flag=True, help="Export what is committed so far.")
@click.option("--parquet", is_flag=True, help="One row per token with its logprobs, as Parquet.")
@click.option("--logprobs", is_flag=True, help="Add each token's logprobs (JSONL only).")
@click.option(
    "--lead-span",
    type=click.FloatRange(0, 1, min_open=True),
    help="Export this first part of every trace.",
)
@click.option("--limit", type=click.IntRange(1), help="Export so many traces, the first ones.")
@click.option("--trace", "trace_ids", multiple=True, help="Export this trace; repeatable.")
def export_command(
    cache: str,
    out: Path,
    text: bool,
    model: str | None,
    allow_unsealed: bool,
    parquet: bool,
    logprobs: bool,
    lead_span: float | None,
    limit: int | None,
    trace_ids: tuple[str, ...],
) -> None:
    """Write the traces as JSONL with their token ids, as `score` reads them, or as Parquet.

    \b
    cache-teacher export cache traces.jsonl
    cache-teacher export cache look.jsonl --limit 3 --lead-span 0.1 --text --logprobs
    cache-teacher export cache tokens.parquet --parquet
    """
    from teacher_cache.sources.tokenizer import load_tokenizer
    from teacher_cache.transform.export import ExportRange, export_parquet, export_traces

    if parquet and (text or logprobs):
        raise click.UsageError(
            "--text and --logprobs add to JSONL; leave them out with --parquet, which has the "
            "logprobs anyway"
        )
    opened = open_cache(cache, allow_unsealed=allow_unsealed)
    part = ExportRange(lead_span, limit, trace_ids)
    if parquet:
        click.echo(f"{out}: {export_parquet(opened, out, part):,} traces")
        return
    tokenizer = load_tokenizer(opened.header, model) if text else None
    num_traces = export_traces(opened, out, tokenizer, part, logprobs=logprobs)
    click.echo(f"{out}: {num_traces:,} traces")


@click.command("truncate")
@click.argument("source")
@click.argument("out")
@click.option(
    "--lead-span",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Keep this first part of every trace.",
)
@click.option("--top-k", type=click.IntRange(1), help="Keep at most so many entries per token.")
def truncate_command(source: str, out: str, lead_span: float, top_k: int | None) -> None:
    """Write a smaller cache: the first part of every trace, or fewer entries per token.

    \b
    cache-teacher truncate cache half --lead-span 0.5 --top-k 16
    """
    from teacher_cache.transform.truncate import truncate_cache

    seal = truncate_cache(open_cache(source), out, lead_span=lead_span, top_k=top_k).seal
    if seal is not None:
        click.echo(f"{shown(out)}: sealed, {seal.num_traces:,} traces, {seal.num_tokens:,} tokens")


def _tokenizer_to_show(header: CacheHeader, model: str | None) -> "TeacherTokenizer | None":
    """The teacher's tokenizer; without one, ids are shown instead of text."""
    from teacher_cache.sources.tokenizer import load_tokenizer

    try:
        return load_tokenizer(header, model)
    except (EngineError, CacheError, ModuleNotFoundError) as error:
        if model is not None:
            raise
        click.echo(f"token ids instead of text ({error}); --model says where the teacher is")
        return None
