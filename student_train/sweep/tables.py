"""The tables of a sweep's report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from student_train.sweep.cells import FULL
from student_train.sweep.conclusion import share_of_full
from student_train.sweep.decisions import Answer, Decision
from student_train.sweep.groups import Group
from student_train.sweep.labels import (
    label,
    whole_percent,
    with_interval,
)
from teacher_cache.format.checksums import read_record
from teacher_cache.pages.numbers import percent, quantity
from teacher_cache.pages.page import table, words
from teacher_cache.terminal.progress import duration

if TYPE_CHECKING:
    from markupsafe import Markup

_UNKNOWN = "-"


def overview(groups: Sequence[Group], decisions: Mapping[str, Decision]) -> "Markup":
    """Overview of the groups by accuracy: the figures behind the answer."""
    full = next((group for group in groups if group.name == FULL), None)
    rows = []
    for group in sorted(groups, key=lambda group: -group.mean_accuracy):
        kept = "100 %" if group is full else _UNKNOWN
        if group is not full and group.gain_retention:
            kept = with_interval(group.gain_retention)
        computation = None if full is None else share_of_full(group, full, ("run", "flops"))
        rows.append(
            [
                label(group),
                whole_percent(group.mean_accuracy)
                if group.accuracy is None
                else with_interval(group.accuracy),
                kept,
                _enough(decisions.get(group.name)),
                "none" if group.kind == "base" else _share(computation),
                "" if group.kind == "base" else str(len(group.cells)),
            ]
        )
    columns = ["trained on", "right answers", "gain kept", "enough?", "computation", "runs"]
    return table(columns, rows)


def _enough(decision: Decision | None) -> str:
    if decision is None:
        return ""
    if decision.answer is not Answer.UNKNOWN:
        return str(decision.answer)
    ways = []
    if decision.prompts_needed is not None:
        ways.append(f"{decision.prompts_needed:,} prompts")
    if decision.seeds_needed is not None:
        ways.append(f"{decision.seeds_needed:,} seeds")
    return f"{decision.answer}" + (f"; about {' or '.join(ways)} would" if ways else "")


def answers(groups: Sequence[Group]) -> "Markup":
    """Properties of the answers beside right or wrong."""
    figures = ("unfinished_share", "unclosed_share", "mean_tokens", "num_beyond_limits")
    rows = []
    for group in groups:
        values = [group.mean("evaluation", "answers", name) for name in figures]
        shares = [_share(value) for value in values[:2]]
        retention = _UNKNOWN if group.retention is None else with_interval(group.retention)
        counts = [_number(values[2], "{:.1f}"), _number(values[3], "{:.1f}")]
        rows.append([label(group), retention, *shares, *counts])
    columns = ["trained on", "of the full-length accuracy", "unfinished", "reasoning never closed"]
    return table([*columns, "tokens per answer", "too costly to compare"], rows)


def by_problem_group(groups: Sequence[Group]) -> "Markup":
    """Accuracy by the field that --group-by named."""
    names = sorted({n for g in groups for c in g.cells for n in c.result["evaluation"]["groups"]})
    if not names:
        return words("The prompts are not told apart (--group-by).")
    rows = [
        [label(group)]
        + [_share(group.mean("evaluation", "groups", name, "accuracy")) for name in names]
        for group in groups
    ]
    return table(["right answers to", *names], rows)


def costs(groups: Sequence[Group]) -> "Markup":
    """Costs of training, absolute and relative to whole traces."""
    full = next((group for group in groups if group.name == FULL), None)
    rows = []
    for group in groups:
        if group.kind == "base":
            continue

        def of_full(path: tuple[str, ...], text: str, group: Group = group) -> str:
            share = None if full is None or not text else share_of_full(group, full, path)
            return text if share is None else f"{text} ({whole_percent(share)})"

        rows.append(
            [
                label(group),
                of_full(("run", "flops"), _quantity(group, ("run", "flops"), "FLOP")),
                of_full(("run", "train_s"), _seconds(group.mean("run", "train_s"))),
                of_full(
                    ("run", "peak_memory_bytes"),
                    _quantity(group, ("run", "peak_memory_bytes"), "B"),
                ),
                of_full(("run", "bytes_read"), _quantity(group, ("run", "bytes_read"), "B")),
                _quantity(group, ("costs", "cache_bytes"), "B"),
                _quantity(group, ("run", "tokens_trained"), ""),
                _share(group.mean("costs", "cot_share")),
                _quantity(group, ("costs", "tokens_saved"), ""),
                _number(group.mean("break_even_runs"), "{:.2f}"),
            ]
        )
    columns = ["trained on", "computation", "time", "peak memory", "read", "cache of that size"]
    columns += ["tokens trained", "of the reasoning", "teacher tokens saved", "break-even, runs"]
    return table(columns, rows)


def flops(file: Path) -> "Markup":
    """The formula's FLOPs beside PyTorch's count; empty where they were not counted."""
    if not file.exists():
        return words("")
    rows = [
        [
            percent(row["lead_span"]),
            *(f"{row[name]:,}" for name in ("num_positions", "by_formula", "counted")),
            f"{row['counted'] / row['by_formula']:.3f}",
        ]
        for row in read_record(file, "Remove it: it is created again.")["rows"]
    ]
    columns = ["of one trace", "positions", "FLOP by formula", "by PyTorch's counter", "ratio"]
    return table(columns, rows) + words("PyTorch counts the masked half of attention too.")


def heldout(groups: Sequence[Group]) -> "Markup":
    """Distance from the teacher on held-out traces, by section."""
    sections = {"prompt": "prompt", "cot": "reasoning", "answer": "answer", "all": "all"}
    rows = []
    for group in groups:
        row = [label(group)]
        for section in sections:
            for figure in ("kl", "nll"):
                row.append(_number(group.mean("evaluation", "heldout", section, figure), "{:.4f}"))
        if set(row[1:]) != {_UNKNOWN}:
            rows.append(row)
    if not rows:
        return words("Not measured (--heldout-cache).")
    columns = [f"{name} {section}" for section in sections.values() for name in ("KL", "NLL")]
    return table(["nats per token", *columns], rows)


def _share(value: float | None) -> str:
    return _UNKNOWN if value is None else whole_percent(value)


def _seconds(value: float | None) -> str:
    return "" if value is None else duration(value)


def _quantity(group: Group, path: tuple[str, ...], unit: str) -> str:
    value = group.mean(*path)
    return _UNKNOWN if value is None else quantity(value, unit)


def _number(value: float | None, form: str) -> str:
    return _UNKNOWN if value is None else form.format(value)
