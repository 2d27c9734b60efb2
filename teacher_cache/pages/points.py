"""A chart of figures with intervals over what they cost, each with its name beside it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from teacher_cache.pages.axis import Axis, Form, Tick
from teacher_cache.pages.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    NUM_COLOURS,
    RIGHT,
    TOP,
    WIDTH,
    missing_note,
    path_of,
)
from teacher_cache.pages.intervals import Figure

_CHARACTER, _LINE = 6.6, 14.0  # size of a character, as far as one can know it beforehand
_GAP = 7.0  # from a point to its name
_MOST_SHIFTS = 22  # of half a line, up or down, until a name stays where it is
_Place = tuple[float, float]
_Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class NamePlace:
    """Where a name begins or ends."""

    x: float
    y: float
    anchor: str


@dataclass(frozen=True)
class Point:
    """A figure in a chart's units."""

    x: float
    y: float
    y_low: float
    y_high: float
    number: int  # of its colour
    name: str  # beside it; empty where it goes without
    name_place: NamePlace
    summary: str


@dataclass(frozen=True)
class Level:
    """A figure that does not depend on what is across: a line, and its interval as a band."""

    y: float
    y_low: float
    y_high: float
    number: int
    name: str


@dataclass(frozen=True)
class PointChart:
    """Figures over what they cost, or over any other number."""

    title: str
    x_label: str
    y_label: str
    points: tuple[Point, ...]
    levels: tuple[Level, ...]
    line: str  # path
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    note: str


def point_chart(
    title: str,
    x_label: str,
    y_label: str,
    points: Sequence[tuple[float, Figure]],
    *,
    line: Sequence[tuple[float, float]] = (),
    levels: Sequence[Figure] = (),
    has_names: bool = True,
    form: Form,
) -> PointChart:
    """Lay out shares from zero upwards; what is not a number is left out, and the chart says so.

    Args:
        title: Heading of the chart.
        x_label: What is across.
        y_label: What is upwards.
        points: What is across, and the figure.
        line: A line to draw, in values.
        levels: Figures that are lines across.
        has_names: Whether names stand beside the points.
        form: Writes values of both axes.
    """
    known = [(x, one) for x, one in points if math.isfinite(x) and one.is_known]
    known_levels = [one for one in levels if one.is_known]
    most = max((x for x, _ in known), default=1.0) or 1.0
    x_axis = Axis(0.0, most, LEFT + 8, WIDTH - RIGHT - 14, form=form)
    figures = [*(one for _, one in known), *known_levels]
    highest = max((h for one in figures for h in (one.value, one.high)), default=1.0)
    y_axis = Axis(0.0, min(1.0, 1.1 * highest) or 1.0, HEIGHT - BOTTOM, TOP, form=form)
    corners = [(x_axis.place(x), y_axis.place(y)) for x, y in line]
    num_missing = len(points) + len(levels) - len(figures)
    return PointChart(
        title, x_label, y_label,
        _placed_points(known, x_label, x_axis, y_axis, corners, has_names=has_names),
        tuple(_level(one, y_axis) for one in known_levels),
        path_of(corners), x_axis.ticks(5), y_axis.ticks(5),
        missing_note(len(points) + len(levels), num_missing),
    )  # fmt: skip


def _level(one: Figure, y_axis: Axis) -> Level:
    low, high = y_axis.place(one.low), y_axis.place(one.high)
    return Level(y_axis.place(one.value), low, high, one.colour % NUM_COLOURS, one.name)


def _placed_points(
    points: Sequence[tuple[float, Figure]],
    x_label: str,
    x_axis: Axis,
    y_axis: Axis,
    corners: Sequence[_Place],
    *,
    has_names: bool,
) -> tuple[Point, ...]:
    form = y_axis.form
    places = [(x_axis.place(x), y_axis.place(one.value)) for x, one in points]
    ends = [(y_axis.place(one.low), y_axis.place(one.high)) for _, one in points]
    names = [one.name if has_names else "" for _, one in points]
    whiskers = [((x, low), (x, high)) for (x, _), (low, high) in zip(places, ends, strict=True)]
    taken = [_around(*both) for both in (*whiskers, *pairwise(corners))]
    beside = _name_places(places, names, taken)
    return tuple(
        Point(
            *place, *own_ends, one.colour % NUM_COLOURS, name, where,
            f"{one.name}: {one.words(form)}, {x_label} {form(x)}",
        )
        for (x, one), place, own_ends, name, where in zip(
            points, places, ends, names, beside, strict=True
        )
    )  # fmt: skip


def _name_places(
    points: Sequence[_Place], names: Sequence[str], taken: list[_Box]
) -> list[NamePlace]:
    """Where each name stands: beside its point, moved where something else is there already."""
    found = []
    for point, name in zip(points, names, strict=True):
        candidates = list(_candidates(point, name))
        free = (
            (place, box)
            for place, box in candidates
            if _is_inside(box) and not any(_overlap(box, other) for other in taken)
        )
        place, box = next(free, candidates[0])
        taken.append(box)
        found.append(place)
    return found


def _candidates(point: _Place, name: str) -> Iterator[tuple[NamePlace, _Box]]:
    """Places of a name right and left of its point, then ever further up and down."""
    x, y = point
    width = _CHARACTER * len(name)
    for step in range(_MOST_SHIFTS):
        middle = y + _LINE / 2 * (-(step + 1) // 2 if step % 2 else step // 2)
        for anchor, name_x, left in (
            ("start", x + _GAP, x + _GAP),
            ("end", x - _GAP, x - _GAP - width),
        ):
            place = NamePlace(round(name_x, 1), round(middle + 4, 1), anchor)
            yield place, (left, middle - _LINE / 2, left + width, middle + _LINE / 2)


def _around(one: _Place, other: _Place) -> _Box:
    (left, right), (top, bottom) = sorted((one[0], other[0])), sorted((one[1], other[1]))
    return left - 4, top - 2, right + 4, bottom + 2


def _is_inside(box: _Box) -> bool:
    left, top, right, bottom = box
    return left >= LEFT and right <= WIDTH and top >= TOP - 6 and bottom <= HEIGHT - BOTTOM


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
