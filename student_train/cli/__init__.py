"""train-student: its commands, and how a mistake is said. Loads torch only when one runs."""

import logging
import sys

import click

from student_train.cli.evaluating import evaluate_command
from student_train.cli.profiling import profile_command
from student_train.cli.running import run_command
from student_train.cli.sweeping import sweep_command
from student_train.errors import InterruptedRunError, NonFiniteLossError, OutOfMemoryError
from teacher_cache.format import CacheError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="leadspan")
def cli() -> None:
    """Train students on a cached teacher, and see what they can do.

    \b
    Shell completion: eval "$(_TRAIN_STUDENT_COMPLETE=bash_source train-student)"
    """


for _command in (profile_command, run_command, evaluate_command, sweep_command):
    cli.add_command(_command)


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 1."""
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
    except InterruptedRunError as error:
        click.echo(f"train-student: {error}", err=True)
        sys.exit(128 + error.signal_number)
    except ModuleNotFoundError as error:
        extra = "peft" if error.name == "peft" else "student"
        click.echo(
            f"train-student: {error.name} is not installed; pip install 'leadspan[{extra}]'",
            err=True,
        )
        sys.exit(1)
    except (CacheError, NonFiniteLossError, OutOfMemoryError, ValueError, OSError) as error:
        click.echo(f"train-student: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
