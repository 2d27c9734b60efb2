"""import: caches that other programs wrote."""

import sys

import click

from teacher_cache.capture.early_checks import check_input
from teacher_cache.cli import report_text
from teacher_cache.format import shown
from teacher_cache.sources import Input
from teacher_cache.terminal.commands import config_command
from teacher_cache.terminal.early_checks import check_file, check_model, check_out_cache
from teacher_cache.transform.importing.configs import ImportConfig


@config_command("import", ImportConfig)
def import_command(config: ImportConfig) -> None:
    """Make a cache of rows that another program wrote.

    \b
    cache-teacher import rows.parquet cache --model Qwen/Qwen3-32B --format columns \\
        --token-ids-column input_ids --top-ids-column top_k_ids --values-column top_k_logprobs
    cache-teacher import answers.jsonl cache --model Qwen/Qwen3-32B --format server
    """
    check_out_cache(config.out, "OUT")
    check_input(Input(config.rows, config.dataset_config, config.split))
    check_model(config.model, "--model")
    if config.compression_config is not None:
        check_file(config.compression_config, "--compression-config")
    from teacher_cache.transform.importing.run import import_cache

    report = import_cache(config)
    click.echo(
        report_text.imported_line(report, shown(config.out)), err=report.stopped_by is not None
    )
    if report.stopped_by is not None:
        sys.exit(128 + report.stopped_by)
