"""view: traces of a cache as a page."""

import click

from teacher_cache.cli.reading import tokenizer_to_show
from teacher_cache.examine.view import write_view
from teacher_cache.format import open_cache, shown
from teacher_cache.pages.choice import ViewConfig
from teacher_cache.pages.numbers import byte_count
from teacher_cache.terminal.commands import config_command
from teacher_cache.terminal.early_checks import check_cache, check_out_file
from teacher_cache.terminal.escape import printable
from teacher_cache.terminal.progress import Progress


@config_command("view", ViewConfig)
def view_command(config: ViewConfig) -> None:
    """Write a page of traces, token by token.

    One file, for any browser, offline.

    Tokens are coloured by entropy, tail, surprise or kept entries, each with its alternatives; a
    slider shows what lies before any lead span. `train-student view` adds a student.

    \b
    cache-teacher view cache --sample 20 -o page.html
    cache-teacher view cache --trace gsm8k-17 -o page.html
    """
    check_cache(config.cache)
    check_out_file(config.out, "--out", force=config.force)
    with Progress(f"viewing {shown(config.cache)}"):
        cache = open_cache(config.cache, allow_unsealed=True)
        for trace_id in config.trace:  # before a tokenizer is looked for, maybe on the network
            cache.place(trace_id)
        size_bytes = write_view(config, cache, tokenizer_to_show(cache.header, config.model))
    click.echo(f"{printable(config.out)}: {byte_count(size_bytes)}, opens in any browser")
