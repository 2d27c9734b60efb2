"""verify: whether a cache is what it was when it was written."""

import json
import sys
from dataclasses import asdict

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from teacher_cache import messages
from teacher_cache.format.findings import Verification
from teacher_cache.format.repair import repair_cache
from teacher_cache.format.verify import verify_cache


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
    done = repair_cache(found) if repair and found.errors else None
    if as_json:
        figures = {name: value for name, value in asdict(found).items() if name != "header"}
        repaired = None if done is None else asdict(done)
        click.echo(json.dumps({"ok": not found.errors, **figures, "repair": repaired}))
    else:
        for finding in found.notes:
            click.echo(f"note: {messages.finding_line(finding)}", err=True)
        for finding in found.errors:
            click.echo(messages.finding_line(finding))
        click.echo(messages.verified_line(found))
        if done is not None:
            for line in messages.repair_lines(done, cache):
                click.echo(line)
        elif found.errors:
            click.echo(messages.verify_hint(found), err=True)
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
