"""Charts as geometry: where figures stand, and what is said of those that have no place."""

import math

import pytest

from teacher_cache.pages.axis import Axis
from teacher_cache.pages.charts import Series, bar_chart, line_chart
from teacher_cache.pages.intervals import Figure, interval_chart
from teacher_cache.pages.numbers import percent
from teacher_cache.pages.points import point_chart


def test_points_that_are_no_numbers_are_counted_not_dropped_in_silence():
    y = [1.0, math.nan, 3.0, math.inf]
    chart = line_chart("t", "x", "y", [Series("a", range(4), y), Series("b", [0.0], [2.0])])
    figures = [Figure("a", 0.5, 0.4, 0.6), Figure("b", math.nan, 0.0, 1.0)]
    points = point_chart("t", "x", "y", [(0.5, one) for one in figures], form=percent)
    rows = interval_chart("t", figures, low=0.0, high=1.0, form=percent)

    assert chart.note == "2 of 5 points are not numbers and not drawn."
    assert len(chart.curves[0].points) == 2
    assert points.note == rows.note == "1 of 2 points is not a number and not drawn."
    assert line_chart("t", "x", "y", [Series("a", [0.0, 1.0], [1.0, 2.0])]).note == ""
    assert [bar.value for bar in bar_chart("t", {"a": math.nan, "b": 2.0}).bars] == [
        "not a number", "2",
    ]  # fmt: skip


def test_a_band_lies_around_its_curve_after_averaging():
    x = list(range(1000))
    chart = line_chart("t", "x", "y", [Series("a", x, x, [v - 10 for v in x], [v + 10 for v in x])])
    (curve,) = chart.curves

    assert curve.band.endswith("Z")
    assert curve.band.count("L") + 1 == 2 * (curve.path.count("L") + 1) <= 600


def test_bounds_without_an_end_stop_at_the_axis():
    chart = interval_chart(
        "t", [Figure("a", 0.5, -math.inf, math.inf)], low=0.0, high=1.0, form=percent
    )
    (row,) = chart.rows
    assert row.x_low < row.x < row.x_high < 400


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.1, 4000.0), (-3.0, -1.0), (5.0, 5.0)])
def test_ticks_are_round_and_inside(low, high):
    axis = Axis.fitted([low, high], 50.0, 390.0, may_be_log=True, form="{:.6g}".format)
    ticks = axis.ticks()

    assert 2 <= len(ticks) <= 16
    assert all(50 <= tick.place <= 390 for tick in ticks)
    assert all(len(tick.text) <= 5 for tick in ticks)
