import pytest

from student_train.sweep.groups import Estimate, Group
from student_train.sweep.labels import (
    label,
    short_label,
    whole_percent,
    with_interval,
)
from student_train.sweep.results import CellResult
from teacher_cache.pages.numbers import percent, quantity


def group(name, kind, options):
    result = {"group": name, "kind": kind, "seed": 0, "options": options}
    return Group(name, (CellResult(result, None),), None, None, None)


@pytest.mark.parametrize(
    ("name", "kind", "options", "words", "short"),
    [
        ("span-1", "span", {"lead_span": 1.0}, "whole traces", "whole traces"),
        ("span-0.5", "span", {"lead_span": 0.5}, "first 50 % of each trace", "first 50 %"),
        ("tokens-64", "span", {"trace_tokens": 64}, "first 64 tokens of each trace", None),
        ("x", "span", {"lead_span": 0.5, "loss_on": "last"}, "last 50 % of each trace", None),
        ("x", "span", {"lead_span": 0.125, "lead_span_of": "reasoning"},
         "first 12.5 % of the reasoning", None),
        ("x", "span", {"lead_span": 1.0, "sections": ["prompt", "cot"]},
         "whole traces, prompt and reasoning only", None),
        ("x", "span", {"lead_span": 1.0, "loss_dropout": 0.5},
         "whole traces, 50 % of the labels left out at random", None),
        ("x", "mixture", {"lead_span": "0.375:4,1:1"},
         "mixture: 80 % of the traces cut at 37.5 %, 20 % whole", "mixture"),
        ("x", "mixture", {"trace_tokens": "64:1,128:1"},
         "mixture: 50 % of the traces cut at 64 tokens, 50 % cut at 128 tokens", "mixture"),
        ("x", "mixture", {"lead_span": "0.1:1,0.3:1,0.5:1,0.7:1,0.9:1"},
         "random lengths: 5 from 10 % to 90 %, mean 50 %", "random lengths"),
        ("half-steps", "half-steps", {"max_steps": 5}, "whole traces, half the steps",
         "half the steps"),
        ("base", "base", None, "untrained student", "untrained"),
    ],
)  # fmt: skip
def test_a_group_says_what_it_trained_on(name, kind, options, words, short):
    found = group(name, kind, options)

    assert label(found) == words
    assert short_label(found) == (short or words)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.2e8, "B", "120 MB"), (1.03e11, "FLOP", "103 GFLOP"), (4.45e6, "B", "4.45 MB"),
        (999, "B", "999 B"), (999.6, "B", "1.00 kB"), (31_400, "", "31.4 k"), (0, "B", "0 B"),
        (1.255e18, "FLOP", "1.25 EFLOP"),
    ],
)  # fmt: skip
def test_quantities_have_three_digits_and_a_prefix(value, unit, text):
    assert quantity(value, unit) == text


def test_shares_are_short():
    assert [percent(0.375), percent(0.5), percent(-0.0001)] == ["37.5 %", "50 %", "0 %"]
    assert [whole_percent(0.925), whole_percent(-0.001)] == ["92 %", "0 %"]
    assert with_interval(Estimate(0.5, -0.001, float("inf"))) == "50 % (0 % to any more)"
