"""plan: what a capture will cost, from a sample or from given figures."""

import json
from dataclasses import asdict
from typing import Any

import click

from teacher_cache.cli import report_text
from teacher_cache.examine.plan import PlanConfig, plan

_POSITIVE = click.FloatRange(0, min_open=True)


class Count(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """A large number: 32e9, 32B, 600M, 100k."""

    name = "count"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Read the letter at the end as a factor."""
        text = str(value)
        factor = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:], 1.0)
        try:
            number = float(text if factor == 1.0 else text[:-1]) * factor
        except ValueError:
            number = 0.0
        if not 0 < number < float("inf"):
            self.fail(f"expected a number above 0 such as 32B or 1.5e9, got {text!r}", param, ctx)
        return number


@click.command("plan")
@click.option("--prompts", type=click.IntRange(1), required=True, help="Of the whole capture.")
@click.option("--from", "sample", help="A cache of some of them, made with --limit.")
@click.option(
    "--samples-per-prompt",
    type=click.IntRange(1),
    default=PlanConfig.samples_per_prompt,
    show_default=True,
)
@click.option("--tokens-per-trace", type=_POSITIVE, help="Instead of the sample's.")
@click.option("--bytes-per-token", type=_POSITIVE, help="Instead of the sample's.")
@click.option("--tokens-per-s", type=_POSITIVE, help="Rate of the capture, as a trial run says it.")
@click.option(
    "--num-gpus",
    type=click.IntRange(1),
    default=PlanConfig.num_gpus,
    show_default=True,
    help="GPUs that the rates are of.",
)
@click.option(
    "--runs",
    type=click.IntRange(1),
    default=PlanConfig.runs,
    show_default=True,
    help="Student runs on this cache.",
)
@click.option("--epochs", type=_POSITIVE, default=PlanConfig.epochs, show_default=True)
@click.option(
    "--lead-span",
    type=click.FloatRange(0, 1, min_open=True),
    default=PlanConfig.lead_span,
    show_default=True,
    help="Part of every trace that a run trains on.",
)
@click.option("--live-tokens-per-s", type=_POSITIVE, help="Rate of a teacher beside a student.")
@click.option("--gpu-tflops", type=_POSITIVE, help="TFLOP/s that a GPU really reaches.")
@click.option("--teacher-params", type=Count(), help="Active parameters, e.g. 32B.")
@click.option("--student-params", type=Count(), help="E.g. 1.5B.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def plan_command(as_json: bool, **options: Any) -> None:  # noqa: ANN401 (click's own values)
    """Predict tokens, disk, GPU hours, and after how many student runs the capture has paid.

    \b
    cache-teacher generate --model M --prompts p.jsonl --out trial --limit 200
    cache-teacher plan --from trial --prompts 100000 --tokens-per-s 9000
    """
    steps = plan(PlanConfig(**options))
    if as_json:
        click.echo(json.dumps({"steps": [asdict(step) for step in steps]}))
        return
    for step in steps:
        click.echo(report_text.step_line(step))
