"""The charts of a sweep's report: accuracy by span and by cost, and what each group keeps."""

from collections.abc import Sequence

from student_train.sweep.cells import FULL
from student_train.sweep.conclusion import share_of_full
from student_train.sweep.decisions import ENOUGH, candidates
from student_train.sweep.groups import Estimate, Group
from student_train.sweep.labels import label, short_label, whole_percent
from teacher_cache.pages.intervals import Figure, IntervalChart, interval_chart
from teacher_cache.pages.points import PointChart, point_chart

_COLOURS = {
    kind: number
    for number, kind in enumerate(
        ("span", "mixture", "half-steps", "half-traces", "sft", "live", "other", "base")
    )
}
_LEAST_KEPT, _MOST_KEPT = -0.5, 1.5  # ends of the axis at most; intervals may have no end


def point_charts(groups: Sequence[Group]) -> list[PointChart]:
    """Accuracy by lead span and by computation, where there is something to show."""
    curve = [group for group in groups if group.is_plain_span]
    full = next((group for group in groups if group.name == FULL), None)
    found = []
    if curve:
        found.append(_by_span(curve, groups))
    if full is not None:
        found.append(_by_computation(groups, full))
    return found


def interval_charts(groups: Sequence[Group]) -> list[IntervalChart]:
    """What each group keeps of the gain, in pairs, and the accuracy of all groups."""
    if not groups:
        return []
    by_accuracy = interval_chart(
        "Right answers of all, the best on top",
        [_figure(group, group.accuracy, label(group)) for group in groups],
        low=0.0, high=1.0, form=whole_percent, has_bars=True,
    )  # fmt: skip
    return [*_by_share_kept(groups), by_accuracy]


def _by_share_kept(groups: Sequence[Group]) -> list[IntervalChart]:
    has_gain = any(group.gain_retention is not None for group in groups)
    figures = []
    for group in groups:
        share = group.gain_retention if has_gain else group.retention
        if share is not None and group.name != FULL and group.kind != "base":
            figures.append(_figure(group, share, label(group)))
    if not figures:
        return []
    what = "gain" if has_gain else "full-length accuracy"
    bounds = [bound for one in figures for bound in (one.low, one.high)]
    return [
        interval_chart(
            f"Share of the {what} kept, compared with whole traces prompt by prompt",
            figures,
            low=max(_LEAST_KEPT, min(0.0, *bounds)),
            high=min(_MOST_KEPT, max(1.1, *bounds)),
            form=whole_percent,
            marks=[(ENOUGH, f"enough: {whole_percent(ENOUGH)}")],
        )
    ]


def _by_span(curve: Sequence[Group], groups: Sequence[Group]) -> PointChart:
    points = [
        (float(group.options["lead_span"]), _figure(group, group.accuracy, short_label(group)))
        for group in curve  # in the order of spans
    ]
    base = next((group for group in groups if group.kind == "base"), None)
    return point_chart(
        "Right answers by the part of each trace that is trained on",
        "part of each trace", "right answers", points,
        line=[(span, one.value) for span, one in points],
        levels=[] if base is None else [_figure(base, base.accuracy, short_label(base))],
        has_names=False, form=whole_percent,
    )  # fmt: skip


def _by_computation(groups: Sequence[Group], full: Group) -> PointChart:
    """Points over computation, and the front of those unbeaten at equal or lower cost."""
    compared = [full, *candidates(groups), *(group for group in groups if group.kind == "base")]
    points = []
    for group in compared:
        share = 0.0 if group.kind == "base" else share_of_full(group, full, ("run", "flops"))
        if share is not None:
            points.append((share, _figure(group, group.accuracy, short_label(group))))
    front = pareto_front([(share, one.value) for share, one in points])
    most = max(share for share, _ in points)
    return point_chart(
        "Right answers by computation; the line joins the best for it",
        "computation", "right answers", points, line=steps(front, most), form=whole_percent,
    )  # fmt: skip


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other of at most the same cost exceeds in value, by cost."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or value > front[-1][1]:
            front.append((cost, value))
    return front


def steps(front: Sequence[tuple[float, float]], most: float) -> list[tuple[float, float]]:
    """Corners of the line that stays at a value until a higher one is reached."""
    corners: list[tuple[float, float]] = []
    for cost, value in front:
        if corners:
            corners.append((cost, corners[-1][1]))
        corners.append((cost, value))
    return [*corners, (most, front[-1][1])]


def _figure(group: Group, estimate: Estimate | None, name: str) -> Figure:
    """A group's estimate; its mean accuracy alone where its completions are missing."""
    kind = group.kind if group.kind != "span" or group.is_plain_span else "other"
    colour = _COLOURS.get(kind, _COLOURS["other"])
    if estimate is None:
        return Figure(name, group.mean_accuracy, group.mean_accuracy, group.mean_accuracy, colour)
    return Figure(name, estimate.value, estimate.low, estimate.high, colour)
