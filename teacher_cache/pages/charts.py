"""Charts as geometry in the units of an SVG; `parts.html` draws them, colours are the style's.

Charts are small (400 units wide), so that their labels can be read on a phone: a page sets several
beside each other.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 400.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 10.0, 10.0, 38.0
_BAR_HEIGHT, _BAR_LEFT, _BAR_RIGHT = 20.0, 92.0, 62.0
_LOG_FROM = 20.0  # ratio of the largest to the smallest value from which an axis is logarithmic
_MAX_POINTS = 300  # of a curve: more are averaged in groups


@dataclass(frozen=True)
class Series:
    """A curve's data."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Curve:
    """A series in the chart's units."""

    name: str
    number: int  # of its colour
    path: str
    points: tuple[tuple[float, float], ...]  # marked one by one if there are few
    summary: str  # its ends, in words


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    place: float
    text: str


@dataclass(frozen=True)
class LineChart:
    """Curves over a common axis."""

    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


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


def line_chart(title: str, x_label: str, y_label: str, series: Sequence[Series]) -> LineChart:
    """Lay out curves; values that are not finite are left out.

    Args:
        title: Heading of the chart.
        x_label: What is across.
        y_label: What is upwards.
        series: The curves; their order is that of the colours.
    """
    cleaned = [_averaged(one) for one in series]
    x_axis = _Axis.of(
        [x for one in cleaned for x in one.x], _LEFT, WIDTH - _RIGHT, may_be_log=False
    )
    y_axis = _Axis.of(
        [y for one in cleaned for y in one.y], HEIGHT - _BOTTOM, _TOP, may_be_log=True
    )
    curves = []
    for number, one in enumerate(cleaned):
        points = tuple(
            (round(x_axis.place(x), 1), round(y_axis.place(y), 1))
            for x, y in zip(one.x, one.y, strict=True)
        )
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points) if points else ""
        summary = f"from {one.y[0]:.4g} to {one.y[-1]:.4g}" if points else "no values"
        marked = points if len(points) <= 30 else ()
        curves.append(Curve(one.name, number % 8, path, marked, f"{one.name}: {summary}"))
    return LineChart(title, x_label, y_label, tuple(curves), x_axis.ticks(), y_axis.ticks())


def bar_chart(title: str, values: Mapping[str, float], *, form: str = "{:,.0f}") -> BarChart:
    """Lay out bars by label; `form` formats a value."""
    most = max(values.values(), default=0) or 1
    room = WIDTH - _BAR_LEFT - _BAR_RIGHT
    bars = tuple(
        Bar(number * _BAR_HEIGHT, round(room * value / most, 1), label, form.format(value))
        for number, (label, value) in enumerate(values.items())
    )
    return BarChart(title, len(bars) * _BAR_HEIGHT, bars)


def _averaged(series: Series) -> Series:
    pairs = [
        (float(x), float(y))
        for x, y in zip(series.x, series.y, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]
    size = -(-len(pairs) // _MAX_POINTS) or 1
    groups = [pairs[first : first + size] for first in range(0, len(pairs), size)]
    x = [sum(x for x, _ in group) / len(group) for group in groups]
    y = [sum(y for _, y in group) / len(group) for group in groups]
    return Series(series.name, x, y)


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float  # place of `low` in the chart
    end: float
    is_log: bool

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float, *, may_be_log: bool) -> "_Axis":
        low, high = min(values, default=0.0), max(values, default=1.0)
        is_log = may_be_log and low > 0 and high / low > _LOG_FROM
        if not is_log and low > 0 and low < high / 2:
            low = 0.0
        if low == high:
            low, high = low - 0.5, high + 0.5
        return cls(low, high, start, end, is_log)

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> tuple[Tick, ...]:
        if self.is_log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            values = [d * 10.0**power for power in range(first, last) for d in (1, 2, 5)]
        else:
            step = _step((self.high - self.low) / 4)
            first = math.ceil(self.low / step - 1e-9)
            values = [n * step for n in range(first, first + 12)]
        inside = [v for v in values if self.low - 1e-12 <= v <= self.high * (1 + 1e-9) + 1e-12]
        return tuple(Tick(round(self.place(value), 1), _tick_text(value)) for value in inside)


def _step(least: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= least * (1 - 1e-9))


def _tick_text(value: float) -> str:
    for limit, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{prefix}"
    return f"{value:.6g}"
