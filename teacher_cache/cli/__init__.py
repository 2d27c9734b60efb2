"""cache-teacher: its commands, and how a mistake is said. Options and messages, nothing else."""

import logging
import os
import sys
from typing import NoReturn

import click

from teacher_cache.cli import capturing, checking, planning, reading
from teacher_cache.engines import EngineError
from teacher_cache.format import CacheError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
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
    reading.inspect_command,
    reading.export_command,
    reading.truncate_command,
):
    cli.add_command(_command)


def program() -> NoReturn:
    """What the installed command runs: `main`, then an end that nothing can spoil.

    Threads that vLLM leaves behind now and then abort the interpreter while it is torn down
    ("terminate called without an active exception"), after all is written and said.
    """
    code: int | str | None = 0
    try:
        main()
    except SystemExit as exited:
        code = exited.code
    if "vllm" in sys.modules and isinstance(code, int):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main() -> None:
    """Run a command: a user's mistake is one line on stderr and exit code 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("transformers", "httpx", "torch"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except ModuleNotFoundError as error:
        click.echo(
            f"cache-teacher: {error.name} is not installed; with a GPU: pip install "
            "'.[teacher]' in a checkout, without one: pip install '.[cpu]'",
            err=True,
        )
        sys.exit(1)
    except (CacheError, EngineError, ValueError) as error:
        click.echo(f"cache-teacher: {error}", err=True)
        sys.exit(1)
    except OSError as error:  # the disk is full, or may not be written
        click.echo(
            f"cache-teacher: {error}; what was finished before is kept, mend this and run the "
            "same command again",
            err=True,
        )
        sys.exit(1)
