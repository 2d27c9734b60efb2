"""The commands of cache-teacher."""

import click

from teacher_cache.cli import (
    capturing,
    checking,
    importing,
    planning,
    previewing,
    pushing,
    reading,
    viewing,
)
from teacher_cache.terminal.group import Program


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="leadspan")
def cli() -> None:
    """Run a teacher once and keep its top-k logits as a cache of Arrow shards.

    \b
    Shell completion: eval "$(_CACHE_TEACHER_COMPLETE=bash_source cache-teacher)"
    """


for _command in (
    capturing.generate_command,
    capturing.score_command,
    capturing.seal_command,
    checking.verify_command,
    checking.audit_command,
    planning.plan_command,
    previewing.preview_command,
    reading.inspect_command,
    reading.export_command,
    reading.truncate_command,
    reading.retokenize_command,
    importing.import_command,
    pushing.push_command,
    viewing.view_command,
):
    cli.add_command(_command)
