"""The commands of train-student."""

import click

from student_train.cli.comparing import compare_command
from student_train.cli.evaluating import evaluate_command
from student_train.cli.going_rounds import rounds_command
from student_train.cli.profiling import profile_command
from student_train.cli.rolling_out import rollout_command
from student_train.cli.running import run_command
from student_train.cli.sweeping import sweep_command
from student_train.cli.viewing import view_command
from teacher_cache.terminal.group import Program


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="leadspan")
def cli() -> None:
    """Train students on a cached teacher, and evaluate them.

    \b
    Shell completion: eval "$(_TRAIN_STUDENT_COMPLETE=bash_source train-student)"
    """


for _command in (
    profile_command,
    run_command,
    evaluate_command,
    rollout_command,
    view_command,
    compare_command,
    sweep_command,
    rounds_command,
):
    cli.add_command(_command)
