"""report.png: quality and cost against lead span, and what was compared with them."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from student_train.sweep.cells import FULL
from student_train.sweep.conclusion import COSTS, share_of_full
from student_train.sweep.results import Estimate, Group
from teacher_cache.format.files import publish_file

_BASELINE_COLOURS = {
    "base": "0.5", "sft": "tab:red", "half-traces": "tab:purple", "half-steps": "tab:brown",
    "live": "tab:green",
}  # fmt: skip

_COST_COLOURS = ("tab:orange", "tab:red", "tab:green", "tab:purple")


def draw(groups: Sequence[Group], file: Path) -> None:
    """Write the picture; panels without anything to show are left out."""
    curve = [group for group in groups if group.is_plain_span]
    others = [g for g in groups if not g.is_plain_span and g.kind == "span"]
    panels = [bool(curve), bool(curve) and any(g.name == FULL for g in curve), bool(others)]
    num_panels = max(1, sum(panels))
    # Not pyplot, which keeps state and asks for a display.
    figure = Figure(figsize=(5.4 * num_panels, 4.2), layout="constrained")
    axes = iter(figure.subplots(1, num_panels, squeeze=False)[0])
    if panels[0]:
        _draw_quality(next(axes), curve, groups)
    if panels[1]:
        _draw_costs(next(axes), curve)
    if panels[2]:
        _draw_others(next(axes), others, groups)
    with mpl.rc_context({"font.size": 9}), publish_file(file) as temporary:
        figure.savefig(temporary, dpi=130)


def _draw_quality(axes: Axes, curve: Sequence[Group], groups: Sequence[Group]) -> None:
    spans = [float(group.options["lead_span"]) for group in curve]
    _error_bars(axes, spans, [g.accuracy for g in curve], "tab:blue", "lead span")
    for group in groups:
        if group.kind in _BASELINE_COLOURS:
            colour = _BASELINE_COLOURS[group.kind]
            label = f"{group.name} {group.accuracy.value:.0%}"
            axes.axhline(group.accuracy.value, color=colour, linestyle="--", label=label)
            axes.axhspan(group.accuracy.low, group.accuracy.high, color=colour, alpha=0.08)
    axes.set(xlabel="lead span", ylabel="accuracy", ylim=(0, 1), title="Quality")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _draw_costs(axes: Axes, curve: Sequence[Group]) -> None:
    full = next(group for group in curve if group.name == FULL)
    spans = [float(group.options["lead_span"]) for group in curve]
    kept = [group.gain_retention or group.retention for group in curve]
    name = "accuracy gain" if full.gain_retention else "accuracy"
    if all(kept):
        _error_bars(axes, spans, [k for k in kept if k], "tab:blue", f"{name} kept")
    for (label, path), colour in zip(COSTS, _COST_COLOURS, strict=True):
        shares = [share_of_full(group, full, path) for group in curve]
        if None not in shares:
            known = [share or 0.0 for share in shares]
            axes.plot(spans, known, color=colour, marker=".", linewidth=1, label=label)
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, zorder=0)
    axes.set(xlabel="lead span", ylabel="share of full length", title="What it keeps and costs")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _draw_others(axes: Axes, others: Sequence[Group], groups: Sequence[Group]) -> None:
    spans = {group.options.get("lead_span") for group in others}  # whose plain cells stand beside
    shown = [*others, *(g for g in groups if g.is_plain_span and g.options["lead_span"] in spans)]
    shown.sort(key=lambda group: (group.options.get("lead_span", 0.0), not group.is_plain_span))
    places = list(range(len(shown)))
    values = [group.accuracy.value for group in shown]
    errors = [
        [group.accuracy.value - group.accuracy.low for group in shown],
        [group.accuracy.high - group.accuracy.value for group in shown],
    ]
    colours = ["tab:blue" if group.is_plain_span else "tab:cyan" for group in shown]
    axes.barh(places, values, xerr=errors, color=colours, ecolor="0.3", capsize=2)
    axes.set_yticks(places, [group.name.replace("_", " ") for group in shown])
    axes.set(xlabel="accuracy", xlim=(0, 1), title="Sections, parts, masks")
    axes.grid(alpha=0.3, axis="x")


def _error_bars(
    axes: Axes, x: Sequence[float], estimates: Sequence[Estimate], colour: str, label: str
) -> None:
    values = [estimate.value for estimate in estimates]
    errors = [
        [estimate.value - estimate.low for estimate in estimates],
        [estimate.high - estimate.value for estimate in estimates],
    ]
    axes.errorbar(x, values, yerr=errors, color=colour, marker="o", capsize=3, label=label)
