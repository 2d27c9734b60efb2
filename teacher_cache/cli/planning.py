"""plan: the cost of a capture, from a sample or from given figures."""

import json
from dataclasses import asdict

import click

from teacher_cache.cli import report_text
from teacher_cache.examine.plan import PlanConfig, plan
from teacher_cache.terminal.commands import config_command, json_option


@config_command("plan", PlanConfig)
@json_option
def plan_command(config: PlanConfig, as_json: bool) -> None:
    """Predict disk, GPU hours, and when a capture pays off.

    \b
    cache-teacher generate --model M --prompts p.jsonl --out trial --limit 200
    cache-teacher plan --sample trial --num-prompts 100000 --tokens-per-s 9000
    """
    steps = plan(config)
    if as_json:
        click.echo(json.dumps({"steps": [asdict(step) for step in steps]}))
        return
    for step in steps:
        click.echo(report_text.step_line(step))
