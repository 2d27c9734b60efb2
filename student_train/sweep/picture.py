"""report.png, and its panels apart for narrow screens: accuracy against lead span and cost."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, PercentFormatter

from student_train.sweep.cells import FULL
from student_train.sweep.conclusion import share_of_full
from student_train.sweep.decisions import candidates
from student_train.sweep.groups import Estimate, Group
from student_train.sweep.labels import label, short_label
from teacher_cache.format.files import publish

_COLOURS = {  # of every kind

    "span": "tab:blue", "mixture": "tab:green", "half-steps": "tab:brown",
    "half-traces": "tab:purple", "sft": "tab:red", "live": "tab:olive", "base": "0.45",
}  # fmt: skip
_MARKERS = {"span": "o", "mixture": "D", "half-steps": "s", "half-traces": "^", "sft": "v"}
_WIDTH_IN, _HEIGHT_IN = 4.6, 4.0
_LABEL_WIDTH = 30  # characters of a line beside a bar


@dataclass(frozen=True)
class Panel:
    """One picture: its description in words, and the function that draws it."""

    title: str
    draw: Callable[[Axes], None]
    height_in: float = _HEIGHT_IN

    def png(self) -> bytes:
        """The panel alone."""
        return _png([self])


def panels(groups: Sequence[Group]) -> list[Panel]:
    """The pictures that have something to show."""
    shown = [group for group in groups if group.accuracy is not None]
    curve = [group for group in shown if group.is_plain_span]
    full = next((group for group in shown if group.name == FULL), None)
    found = []
    if curve:
        found.append(
            Panel("Accuracy by part of each trace", lambda axes: _draw_curve(axes, curve, shown))
        )
    if full is not None:
        compared = [full, *candidates(shown), *(g for g in shown if g.kind == "base")]
        found.append(
            Panel("Accuracy by computation", lambda axes: _draw_costs(axes, compared, full))
        )
    if shown:
        num_lines = sum(1 + len(label(group)) // _LABEL_WIDTH for group in shown)
        height_in = max(_HEIGHT_IN, 0.8 + 0.11 * len(shown) + 0.15 * num_lines)
        found.append(Panel("All comparisons", lambda axes: _draw_all(axes, shown), height_in))
    return found


def draw(groups: Sequence[Group], file: Path) -> None:
    """Write all panels side by side into one file."""
    publish(file, _png(panels(groups)))


def _png(shown: Sequence[Panel]) -> bytes:
    with mpl.rc_context(
        {
            "font.size": 10,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "text.parse_math": False,
        }
    ):
        # Not pyplot, which keeps state and asks for a display.
        height_in = max([panel.height_in for panel in shown], default=_HEIGHT_IN)
        number = max(1, len(shown))
        figure = Figure(figsize=(_WIDTH_IN * number, height_in), layout="constrained")
        all_axes = figure.subplots(1, number, squeeze=False)[0]
        for panel, axes in zip(shown, all_axes, strict=False):
            panel.draw(axes)
            axes.set_title(panel.title, loc="left", fontsize=11)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=170)
    return content.getvalue()


def _draw_curve(axes: Axes, curve: Sequence[Group], groups: Sequence[Group]) -> None:
    spans = [float(group.options["lead_span"]) for group in curve]
    _error_bars(axes, spans, curve, "span", line="-")
    base = next((group for group in groups if group.kind == "base"), None)
    if base is not None and base.accuracy is not None:
        colour = _COLOURS["base"]
        axes.axhline(base.accuracy.value, color=colour, linestyle="--", linewidth=1)
        axes.axhspan(base.accuracy.low, base.accuracy.high, color=colour, alpha=0.12, linewidth=0)
        axes.annotate(
            "untrained", (1, base.accuracy.value), (0, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", fontsize=9, color=colour,
        )  # fmt: skip
    axes.set(xlabel="part of each trace that is trained on", ylabel="right answers", xlim=(0, 1.04))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    _limit(axes, groups)


def _draw_costs(axes: Axes, groups: Sequence[Group], full: Group) -> None:
    """Points over computation, and the front of those unbeaten at equal or lower cost."""
    points = []
    for group in groups:
        share = 0.0 if group.kind == "base" else share_of_full(group, full, ("run", "flops"))
        if share is not None:
            points.append((share, group))
    for kind in dict.fromkeys(group.kind for _, group in points):
        own = [(share, group) for share, group in points if group.kind == kind]
        _error_bars(axes, [share for share, _ in own], [group for _, group in own], kind)
    front = pareto_front([(share, group.mean_accuracy) for share, group in points])
    right = max(share for share, _ in points)
    ends = [*front, (right, front[-1][1])]
    axes.step(*zip(*ends, strict=True), where="post", color="0.5", linewidth=1, zorder=1)
    _limit(axes, groups)
    _name_points(axes, points)
    axes.set(xlabel="computation (the line: best for it)", ylabel="right answers")
    axes.set_xlim(-0.03 * right, 1.4 * right)  # room for the names
    axes.set_xticks([n / 4 for n in range(math.floor(4 * right) + 1)])
    axes.xaxis.set_major_formatter(PercentFormatter(1))


def _name_points(axes: Axes, points: Sequence[tuple[float, Group]]) -> None:
    """A name beside each point, moved up where it would overlap another."""
    line = 0.045 * axes.get_ylim()[1]  # height of a name
    right = max(share for share, _ in points)
    placed: list[tuple[float, float]] = []
    for share, group in sorted(points, key=lambda point: point[1].mean_accuracy):
        height = group.mean_accuracy - (line if group.kind == "base" else 0)  # below the front
        near = [y for x, y in placed if abs(x - share) < 0.24 * right]
        while any(abs(y - height) < line for y in near):
            height += 0.1 * line
        placed.append((share, height))
        name = axes.annotate(
            short_label(group), (share, group.mean_accuracy), (share + 0.03 * right, height),
            va="center", fontsize=8, color=_COLOURS.get(group.kind, "tab:cyan"),
        )  # fmt: skip
        name.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5})
        name.set_in_layout(False)


def _draw_all(axes: Axes, groups: Sequence[Group]) -> None:
    """Bars sorted by value, the best on top."""
    shown = sorted(groups, key=lambda group: group.mean_accuracy)
    places = list(range(len(shown)))
    estimates = [group.accuracy for group in shown if group.accuracy is not None]
    axes.barh(
        places, [e.value for e in estimates], xerr=_errors(estimates), ecolor="0.3", capsize=2,
        color=[_COLOURS.get(group.kind, "tab:cyan") for group in shown],
    )  # fmt: skip
    axes.set_yticks(places, [fill(label(group), _LABEL_WIDTH) for group in shown], fontsize=8)
    axes.set(xlabel="right answers", xlim=(0, 1))
    axes.xaxis.set_major_locator(MultipleLocator(0.5))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(visible=False, axis="y")


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other of at most the same cost exceeds in value, by cost."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or value > front[-1][1]:
            front.append((cost, value))
    return front


def _error_bars(
    axes: Axes, x: Sequence[float], groups: Sequence[Group], kind: str, line: str = ""
) -> None:
    estimates = [group.accuracy for group in groups if group.accuracy is not None]
    axes.errorbar(
        x, [e.value for e in estimates], yerr=_errors(estimates), color=_COLOURS.get(kind),
        marker=_MARKERS.get(kind, "x"), markersize=5, linestyle=line, capsize=2, elinewidth=1,
    )  # fmt: skip


def _errors(estimates: Sequence[Estimate]) -> list[list[float]]:
    return [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]


def _limit(axes: Axes, groups: Sequence[Group]) -> None:
    """Limit the axis to zero and a little above the most accurate."""
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(0, min(1.02, 1.15 * max(g.accuracy.high for g in groups if g.accuracy)))
