"""Charts as geometry in the units of an SVG; `parts.html` draws them, colours are the style's.

Charts are small (400 units wide), so that their labels can be read on a phone: a page sets several
beside each other. Charts of figures with intervals are in `intervals`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from teacher_cache.pages.axis import Axis, Form, Tick, prefixed

WIDTH, HEIGHT = 400.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 10.0, 10.0, 38.0
_BAR_HEIGHT, _BAR_LEFT, _BAR_RIGHT = 20.0, 116.0, 62.0
_MAX_POINTS = 300  # of a curve: more are averaged in groups
NUM_COLOURS = 8


@dataclass(frozen=True)
class Series:
    """A curve's data, and bounds of its band, if it has one."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Curve:
    """A series in the chart's units."""

    name: str
    number: int  # of its colour
    path: str
    band: str  # a closed path; empty without one
    points: tuple[tuple[float, float], ...]  # marked one by one if there are few
    summary: str  # its ends, in words


@dataclass(frozen=True)
class LineChart:
    """Curves over a common axis."""

    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    note: str  # what is not drawn


@dataclass(frozen=True)
class Bar:
    """One bar of a bar chart."""

    y: float
    width: float
    label: str
    value: str


@dataclass(frozen=True)
class BarChart:
    """Horizontal bars, one below the other."""

    title: str
    height: float
    bars: tuple[Bar, ...]


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    x_form: Form = prefixed,
    y_form: Form = prefixed,
) -> LineChart:
    """Lay out curves; points that are not numbers are left out, and the chart says how many.

    Args:
        title: Heading of the chart.
        x_label: What is across.
        y_label: What is upwards.
        series: The curves; their order is that of the colours.
        x_form: Writes a tick of the axis across.
        y_form: Writes a tick of the axis upwards.
    """
    cleaned = [_averaged(one) for one in series]
    x_axis = Axis.fitted(
        [x for one in cleaned for x in one.x], LEFT, WIDTH - RIGHT, may_be_log=False, form=x_form
    )
    y_axis = Axis.fitted(
        [y for one in cleaned for own in (one.y, one.low or (), one.high or ()) for y in own],
        HEIGHT - BOTTOM, TOP, may_be_log=True, form=y_form,
    )  # fmt: skip
    curves = tuple(_curve(number, one, x_axis, y_axis) for number, one in enumerate(cleaned))
    note = missing_note(sum(len(one.x) for one in series), sum(map(_num_missing, series)))
    return LineChart(title, x_label, y_label, curves, x_axis.ticks(), y_axis.ticks(), note)


def _curve(number: int, one: Series, x_axis: Axis, y_axis: Axis) -> Curve:
    points = _placed(one.x, one.y, x_axis, y_axis)
    summary = f"from {one.y[0]:.4g} to {one.y[-1]:.4g}" if points else "no values"
    band = ""
    if points and one.low is not None and one.high is not None:
        above, below = (_placed(one.x, own, x_axis, y_axis) for own in (one.high, one.low))
        band = f"{path_of([*above, *reversed(below)])}Z"
    marked = points if len(points) <= 30 else ()
    colour = number % NUM_COLOURS
    return Curve(one.name, colour, path_of(points), band, marked, f"{one.name}: {summary}")


def _placed(
    x: Sequence[float], y: Sequence[float], x_axis: Axis, y_axis: Axis
) -> tuple[tuple[float, float], ...]:
    return tuple((x_axis.place(a), y_axis.place(b)) for a, b in zip(x, y, strict=True))


def path_of(points: Sequence[tuple[float, float]]) -> str:
    """An SVG path through places."""
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points) if points else ""


def missing_note(num_points: int, num_missing: int) -> str:
    """`3 of 200 points are not numbers`; empty if all are."""
    if not num_missing:
        return ""
    verb = "is not a number" if num_missing == 1 else "are not numbers"
    return f"{num_missing:,} of {num_points:,} points {verb} and not drawn."


def bar_chart(title: str, values: Mapping[str, float], *, form: str = "{:,.0f}") -> BarChart:
    """Lay out bars by label; `form` formats a value. What is not a number is called so."""
    most = max((value for value in values.values() if math.isfinite(value)), default=0) or 1
    room = WIDTH - _BAR_LEFT - _BAR_RIGHT
    bars = tuple(
        Bar(number * _BAR_HEIGHT, round(room * value / most, 1), label, form.format(value))
        if math.isfinite(value)
        else Bar(number * _BAR_HEIGHT, 0.0, label, "not a number")
        for number, (label, value) in enumerate(values.items())
    )
    return BarChart(title, len(bars) * _BAR_HEIGHT, bars)


def _rows(series: Series) -> list[tuple[float, ...]]:
    columns = [own for own in (series.x, series.y, series.low, series.high) if own is not None]
    return [tuple(map(float, row)) for row in zip(*columns, strict=True)]


def _num_missing(series: Series) -> int:
    return sum(not all(map(math.isfinite, row)) for row in _rows(series))


def _averaged(series: Series) -> Series:
    """A series of at most `_MAX_POINTS` finite points."""
    rows = [row for row in _rows(series) if all(map(math.isfinite, row))]
    size = -(-len(rows) // _MAX_POINTS) or 1
    groups = [rows[first : first + size] for first in range(0, len(rows), size)]
    means = [tuple(sum(own) / len(group) for own in zip(*group, strict=True)) for group in groups]
    num_columns = 2 if series.low is None else 4
    columns = [list(own) for own in zip(*means, strict=True)] or [[]] * num_columns
    return Series(series.name, *columns)
