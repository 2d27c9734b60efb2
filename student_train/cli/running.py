"""`train-student run`."""

import click

from student_train.cli.early_checks import check_run
from student_train.run.config import TrainConfig
from teacher_cache.terminal.commands import config_command
from teacher_cache.terminal.launched import is_first_process
from teacher_cache.terminal.progress import Progress


@config_command("run", TrainConfig)
def run_command(config: TrainConfig) -> None:
    """Distil a cached teacher into a student.

    \b
    Example:
      train-student run --cache cache --student Qwen/Qwen3-0.6B --out run --lead-span 0.5

    Run it again to resume after an interruption. RUN/model is the finished student. Start it with
    `accelerate launch -m student_train.cli run ...` to use several devices.
    """
    check_run(config)
    if config.estimate:
        with Progress("loading torch"):
            from student_train.run.memory_estimate import estimate_run

        click.echo(estimate_run(config))
        return
    is_first = is_first_process()
    with Progress("loading torch", enabled=is_first):
        from student_train.run.loop import train

    result = train(config)
    if not is_first:
        return
    if result.was_finished:
        click.echo(f"{config.out} is finished already; nothing was done", err=True)
    click.echo(
        f"{result.model}: {result.num_steps:,} steps, loss {result.metrics['loss']:.4f}, "
        f"{result.metrics['bytes_read']:,} bytes read"
    )
