"""push: caches for others."""

import click

from teacher_cache.terminal.commands import config_command
from teacher_cache.terminal.early_checks import check_cache
from teacher_cache.terminal.escape import printable
from teacher_cache.terminal.progress import Progress
from teacher_cache.transform.push import PushConfig, push


@config_command("push", PushConfig)
def push_command(config: PushConfig) -> None:
    """Send a sealed cache to the Hugging Face Hub.

    Run it again to resume: only what the Hub lacks is sent.

    \b
    cache-teacher push cache hf://datasets/me/qwen3-32b-math --license apache-2.0
    """
    check_cache(config.cache)
    with Progress(f"sending {printable(config.cache)}", unit="files") as progress:
        report = push(config, lambda done, total: progress.set(done, total=total))
    click.echo(
        f"{config.to}: {report.num_files:,} files, {report.num_sent:,} of them sent now "
        f"({report.num_bytes_sent:,} bytes), all as they are here; train on it with "
        f"train-student run --cache {config.to}"
    )
