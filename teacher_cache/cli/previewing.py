"""preview: rows as a capture would see them."""

import json
from dataclasses import asdict

import click

from teacher_cache.capture.configs import PreviewConfig
from teacher_cache.capture.early_checks import check_preview
from teacher_cache.capture.preview import preview_lines, preview_rows
from teacher_cache.terminal.commands import config_command, json_option
from teacher_cache.terminal.escape import printable, printable_lines


@config_command("preview", PreviewConfig)
@json_option
def preview_command(config: PreviewConfig, as_json: bool) -> None:
    """Show rows as a capture would see them, without the weights.

    \b
    cache-teacher preview --model Qwen/Qwen3-32B --traces traces.jsonl --limit 3
    """
    check_preview(config)
    lines, rows = preview_lines(config), preview_rows(config)
    if as_json:
        click.echo(json.dumps({"layout": lines, "rows": [asdict(row) for row in rows]}))
        return
    for line in lines:
        click.echo(line)
    for row in rows:
        if row.rejected is not None:
            click.echo(f"\n{row.where}: left out: {printable(row.rejected, 1000)}")
            continue
        click.echo(f"\n{row.where}: trace {printable(row.trace_id)}, {row.num_tokens:,} tokens")
        for name, text in row.sections:
            click.echo(f"  {name:6} | " + printable_lines(text).replace("\n", "\n         | "))
        if row.beside is not None:
            click.echo(f"  the template's own rendering: {row.beside}")
