"""`train-student sweep`."""

import sys
from pathlib import Path
from typing import Any

import click

from student_train.cli.options import config_option, split_names, split_numbers
from student_train.data.tokens import LOSS_RANGES, WHOLES, TokenSelection
from student_train.sweep.config import BASELINES, SweepConfig


def split_counts(
    ctx: click.Context, param: click.Parameter, value: str | list[float] | None
) -> tuple[int, ...]:
    """Split `64,128`."""
    numbers = split_numbers(ctx, param, value) or ()
    if any(number != int(number) for number in numbers):
        raise click.BadParameter(f"expected whole numbers, got {value!r}")
    return tuple(int(number) for number in numbers)


def split_sets(
    ctx: click.Context, param: click.Parameter, value: str | list[str]
) -> tuple[tuple[str, ...], ...]:
    """Split `prompt+cot,cot`: sets have commas between them, their names a plus."""
    sets = split_names(ctx, param, value)
    return tuple(tuple(name.strip() for name in names.split("+")) for names in sets if names)


@click.command("sweep")
@config_option
@click.option("--cache", required=True, help="Cache folder or URI to train on.")
@click.option("--student", required=True, help="Model folder or hub id that every run starts from.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path),
    help="Folder of the sweep; cells that it holds are not repeated, others are added.",
)  # fmt: skip
@click.option(
    "--eval-prompts", required=True, type=click.Path(path_type=Path),
    help="JSONL of held-out prompts with answers, as of evaluate.",
)  # fmt: skip
@click.option(
    "--eval-cache", default=SweepConfig.eval_cache,
    help="Cache of held-out traces, for KL and NLL on all of each.",
)  # fmt: skip
@click.option(
    "--lead-spans", type=click.UNPROCESSED, callback=split_numbers,
    default=",".join(f"{span:g}" for span in SweepConfig.lead_spans),
    help="Proportions of every trace, with commas.",
)  # fmt: skip
@click.option(
    "--max-tokens-list", type=click.UNPROCESSED, callback=split_counts, default="",
    help="Token budgets per trace, beside the lead spans.",
)  # fmt: skip
@click.option(
    "--sections-list", type=click.UNPROCESSED, callback=split_sets,
    default=",".join("+".join(names) for names in SweepConfig.sections_list),
    help="Sets of sections, each with every span: prompt+cot+answer,cot+answer,...",
)  # fmt: skip
@click.option(
    "--loss-on", type=click.UNPROCESSED, callback=split_names,
    default=",".join(SweepConfig.loss_on),
    help=f"Parts that have the span's length, of {','.join(LOSS_RANGES)}; each with every span.",
)  # fmt: skip
@click.option(
    "--lead-span-of", type=click.Choice(WHOLES), default=TokenSelection.lead_span_of,
    help="What spans are a proportion of.",
)  # fmt: skip
@click.option(
    "--loss-dropout", type=float, default=SweepConfig.loss_dropout,
    help="Share of labels that every cell of this call leaves out at random.",
)  # fmt: skip
@click.option(
    "--baselines", type=click.UNPROCESSED, callback=split_names,
    default=",".join(SweepConfig.baselines),
    help=f"Of {','.join(BASELINES)}; an empty text for none.",
)  # fmt: skip
@click.option(
    "--live-teacher", default=SweepConfig.live_teacher,
    help="The cache's teacher, for the baseline live; a small one.",
)  # fmt: skip
@click.option(
    "--seeds", type=int, default=SweepConfig.seeds, help="Runs per cell, with seeds from 0."
)
@click.option(
    "--run-options", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=SweepConfig.run_options, help="TOML file of options of every run, as --config of run.",
)  # fmt: skip
@click.option(
    "--evaluate-options", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=SweepConfig.evaluate_options,
    help="TOML file of options of every evaluation, as --config of evaluate.",
)  # fmt: skip
@click.option(
    "--worker", default=SweepConfig.worker,
    help="i/n: run every n-th cell alone, i counting from 0, e.g. $SLURM_ARRAY_TASK_ID/8.",
)  # fmt: skip
@click.option(
    "--parallel", type=int, default=SweepConfig.parallel,
    help="Cells at a time; they share this machine's devices.",
)  # fmt: skip
@click.option(
    "--allow-seen-prompts", is_flag=True, default=SweepConfig.allow_seen_prompts,
    help="Evaluate on prompts that stand in the training cache too.",
)  # fmt: skip
def sweep_command(**options: Any) -> None:  # noqa: ANN401  # mirrors SweepConfig
    """Measure how much of each trace a student needs: quality and cost against lead span.

    \b
    Example:
      train-student sweep --cache cache --student Qwen/Qwen3-0.6B --out sweep \\
        --eval-prompts held-out.jsonl --lead-spans 0.1,0.25,0.5,0.75,1.0 --seeds 3

    Every combination of the lists is a cell. Run it again to go on, or with other lists to add
    cells: OUT/results.csv, report.png and report.html tell of all that the folder holds.
    """
    options["baselines"] = tuple(name for name in options["baselines"] if name)
    config = SweepConfig(**options)
    from student_train.sweep.protocol import sweep

    result = sweep(config)
    click.echo(f"{config.out / 'report.html'}: {result.num_finished} cells of this call finished")
    click.echo(result.answer)
    for name in result.failed:
        click.echo(f"train-student: cell {name} failed", err=True)
    if result.failed:
        sys.exit(1)
