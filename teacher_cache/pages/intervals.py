"""A chart of figures with intervals, one below the other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

from teacher_cache.pages.axis import Axis, Form, Tick
from teacher_cache.pages.charts import NUM_COLOURS, WIDTH, missing_note

_LINE = 14.0
_LEFT, _RIGHT, _ROW_HEIGHT = 4.0, 66.0, 22.0
_CHARACTERS_PER_ROW = 58


@dataclass(frozen=True)
class Figure:
    """A figure with its interval; both bounds are the value where there is none."""

    name: str
    value: float
    low: float
    high: float
    colour: int = 0  # equal for figures of one kind

    @property
    def is_known(self) -> bool:
        """Whether the value is a number; bounds may be infinite."""
        return math.isfinite(self.value) and not (math.isnan(self.low) or math.isnan(self.high))

    def words(self, form: Form) -> str:
        """`93 % (90 % to 96 %)`."""
        if self.low == self.high:
            return f"{form(self.value)} (no interval)"
        return f"{form(self.value)} ({form(self.low)} to {form(self.high)})"


@dataclass(frozen=True)
class Row:
    """One figure of an interval chart."""

    lines: tuple[str, ...]  # its name
    y: float  # of the first line
    bar_y: float
    x: float
    x_low: float
    x_high: float
    number: int
    value: str
    summary: str


@dataclass(frozen=True)
class IntervalChart:
    """Figures with their intervals, one below the other."""

    title: str
    height: float
    axis_y: float
    rows: tuple[Row, ...]
    origin: float  # place at which bars begin
    has_bars: bool
    marks: tuple[Tick, ...]  # vertical lines with a word
    ticks: tuple[Tick, ...]
    note: str


def interval_chart(
    title: str,
    figures: Sequence[Figure],
    *,
    low: float,
    high: float,
    form: Form,
    has_bars: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> IntervalChart:
    """Lay out figures, the largest on top; what is not a number is left out, and said.

    Args:
        title: Heading of the chart.
        figures: The figures.
        low: Left end of the axis; bounds beyond either end stop there.
        high: Right end.
        form: Writes a value.
        has_bars: Whether to draw bars from zero rather than points.
        marks: Values to mark by a vertical line, and what they are.
    """
    known = sorted((one for one in figures if one.is_known), key=lambda one: -one.value)
    axis = Axis(low, high, _LEFT, WIDTH - _RIGHT, form=form)
    y = _LINE + 4 if marks else 4.0
    rows = []
    for one in known:
        lines = tuple(wrap(one.name, _CHARACTERS_PER_ROW)) or ("",)
        bar_y = y + _LINE * len(lines) + 8
        rows.append(
            Row(
                lines, y + _LINE - 2, bar_y, axis.place(one.value), axis.place(one.low),
                axis.place(one.high), one.colour % NUM_COLOURS, form(one.value),
                f"{one.name}: {one.words(form)}",
            )
        )  # fmt: skip
        y = bar_y + _ROW_HEIGHT - 8
    shown_marks = tuple(Tick(axis.place(value), text) for value, text in marks)
    note = missing_note(len(figures), len(figures) - len(known))
    return IntervalChart(
        title, y + 22, y + 4, tuple(rows), axis.place(0.0), has_bars, shown_marks, axis.ticks(),
        note,
    )  # fmt: skip
