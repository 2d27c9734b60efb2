"""verify, audit: whether a cache is what was written, and what its teacher says."""

import json
import sys
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from teacher_cache.cli import report_text
from teacher_cache.cli.options import NamedValue, named
from teacher_cache.engines.start import ENGINES
from teacher_cache.examine.audit import AuditConfig, audit
from teacher_cache.format.checking.findings import Verification
from teacher_cache.format.checking.repair import repair_cache
from teacher_cache.format.checking.verify import verify_cache


@click.command("verify")
@click.argument("cache")
@click.option(
    "--repair",
    is_flag=True,
    help="Move damaged shards to CACHE/removed and take the seal off, to capture them again.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def verify_command(cache: str, repair: bool, as_json: bool) -> None:
    """Check every checksum, count and value of a cache; list all that is wrong, and exit with 1.

    With --repair it exits with 0 when what was wrong has been taken out.

    \b
    cache-teacher verify cache
    cache-teacher verify cache --repair
    """
    found = _verified(cache)
    done = repair_cache(cache, found) if repair and found.errors else None
    if as_json:
        figures = {name: value for name, value in asdict(found).items() if name != "header"}
        repaired = None if done is None else asdict(done)
        click.echo(json.dumps({"ok": not found.errors, **figures, "repair": repaired}))
    else:
        for finding in found.notes:
            click.echo(f"note: {report_text.finding_line(finding)}", err=True)
        for finding in found.errors:
            click.echo(report_text.finding_line(finding))
        click.echo(report_text.verified_line(found))
        if done is not None:
            for line in report_text.repair_lines(done, found.path):
                click.echo(line)
        elif found.errors:
            click.echo(report_text.verify_hint(found), err=True)
    if found.errors and done is None:
        sys.exit(1)


def _verified(cache: str) -> Verification:
    if not sys.stderr.isatty():
        return verify_cache(cache)
    columns = (TextColumn("verified"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("verify")
        return verify_cache(
            cache, lambda done, total: bar.update(task, completed=done, total=total)
        )


@click.command("audit")
@click.argument("cache")
@click.option("--model", required=True, help="The teacher: a folder or a Hugging Face id.")
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default=AuditConfig.engine,
    show_default=True,
    help="Scores the sample; best not the one that made the cache.",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=AuditConfig.samples,
    show_default=True,
    help="Traces to score again.",
)
@click.option("--seed", type=int, default=AuditConfig.seed, show_default=True)
@click.option(
    "--max-kl",
    type=click.FloatRange(0),
    default=AuditConfig.max_kl,
    show_default=True,
    help="Largest mean KL from stored to live, nats per token.",
)
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--dtype", default=AuditConfig.dtype, show_default=True)
@click.option(
    "--engine-arg",
    type=NamedValue(),
    multiple=True,
    callback=named,
    help="An engine argument of vLLM. Repeatable.",
)
@click.option("--any-model", is_flag=True, help="Let other weights through; the tokenizer counts.")
@click.option("--allow-unsealed", is_flag=True, help="Audit what is committed so far.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def audit_command(as_json: bool, **options: Any) -> None:  # noqa: ANN401 (click's own values)
    """Score a sample of a cache again with another engine; exit with 1 where it differs too much.

    \b
    cache-teacher audit cache --model Qwen/Qwen3-32B --samples 32
    """
    found = audit(AuditConfig(**options))
    if as_json:
        click.echo(json.dumps({"passed": found.passed, **asdict(found)}))
    else:
        for line in report_text.audit_lines(found):
            click.echo(line)
    if not found.passed:
        sys.exit(1)
