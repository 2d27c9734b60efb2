"""The verdict of a sweep, its corrections, and the sentences that say it."""

import numpy as np
import pytest
from sweeps import costs, curve, make_sweep

from student_train.evaluation.intervals import Mean
from student_train.sweep.conclusion import conclusion
from student_train.sweep.decisions import (
    Answer,
    candidates,
    decide,
    holm,
    prompts_needed,
    seeds_needed,
)
from student_train.sweep.groups import group_cells
from student_train.sweep.results import read_cells


def read(folder, cells, **settings):
    return group_cells(read_cells(make_sweep(folder, cells, **settings), costs))


def decisions_of(folder, cells, **settings):
    return {n: d.answer for n, d in decide(read(folder, cells, **settings)).items()}


@pytest.mark.slow
def test_a_span_keeps_enough_or_not_or_it_cannot_be_told(tmp_path):
    cells = curve({0.25: 0.3, 0.5: 0.74, 0.75: 0.795, 1.0: 0.8}, seeds=5)

    assert decisions_of(tmp_path, cells, num_prompts=1000) == {
        "span-0.25": Answer.NO, "span-0.5": Answer.UNKNOWN, "span-0.75": Answer.YES,
    }  # fmt: skip


@pytest.mark.slow
def test_a_verdict_and_the_interval_never_contradict_each_other(tmp_path):
    for number, accuracy in enumerate((0.6, 0.68, 0.7, 0.72, 0.74, 0.78)):
        groups = read(tmp_path / str(number), curve({0.5: accuracy, 1.0: 0.8}))
        half = next(group for group in groups if group.name == "span-0.5")
        answer = decide(groups)["span-0.5"].answer
        low, high = half.gain_retention.low, half.gain_retention.high
        expected = Answer.YES if low > 0.9 else Answer.NO if high < 0.9 else Answer.UNKNOWN
        assert answer is expected, accuracy


def test_one_seed_tells_nothing(tmp_path):
    groups = read(tmp_path, curve({0.5: 0.3, 1.0: 0.8}, seeds=1))

    assert decide(groups)["span-0.5"].answer is Answer.UNKNOWN
    assert "cannot be told with 1 seed and 200 prompts; about 3 seeds would." in conclusion(groups)


def test_looking_at_more_spans_is_corrected_for():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "c": 0.06, "b": 0.06}
    )
    assert holm({"a": 0.7, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_the_number_of_prompts_or_seeds_that_is_said_would_be_enough():
    """Means whose prompts and seeds scatter as seen are told in about four of five trials."""
    rng = np.random.default_rng(0)
    truth, by_seed, by_prompt, rest = 0.03, 0.004, 0.2, 0.3

    def draw(num_seeds, num_prompts):
        return Mean.of(
            truth
            + rng.normal(0, by_seed, (num_seeds, 1))
            + rng.normal(0, by_prompt, (1, num_prompts))
            + rng.normal(0, rest, (num_seeds, num_prompts))
        )

    seen = Mean(truth, 10, 100, by_seed**2, by_prompt**2, rest**2, 1.0, 9.0)
    needed = prompts_needed(seen, 1)
    assert 400 < needed < 600
    told = sum(draw(10, needed).p_value < 0.05 for _ in range(200))
    assert 0.7 < told / 200 < 0.95
    many = Mean(truth, 3, 1000, 0.03**2, by_prompt**2, rest**2, 1.0, 2.0)
    assert prompts_needed(many, 1) is None  # three seeds never would
    assert 5 < seeds_needed(many, 1) < 40


def test_what_is_exactly_at_the_limit_has_no_number_that_would_tell():
    at_limit = Mean(1e-9, 3, 100, 0.01, 0.1, 0.1, 1.0, 2.0)

    assert prompts_needed(at_limit, 3) is None
    assert seeds_needed(at_limit, 3) is None


def test_candidates_are_what_saves_computation(tmp_path):
    cells = curve({0.5: 0.6, 1.0: 0.8}, seeds=1)
    cells += [
        ("mix-0.375x4+1x1", "mixture", 0, {"lead_span": "0.375:4,1:1"}, 0.7),
        ("tokens-64", "span", 0, {"trace_tokens": 64}, 0.5),
        ("half-steps", "half-steps", 0, {"max_steps": 5}, 0.5),
        ("sft", "sft", 0, {"ce_weight": 1.0}, 0.5),
        ("span-1_cot", "span", 0, {"lead_span": 1.0, "sections": ["cot"]}, 0.6),
    ]
    names = [group.name for group in candidates(read(tmp_path, cells))]

    assert sorted(names) == ["half-steps", "mix-0.375x4+1x1", "span-0.5", "tokens-64"]


def said(folder, cells, **settings):
    return conclusion(read(folder, cells, **settings))


@pytest.mark.slow
def test_yes_names_the_cheapest_that_is_enough_and_its_costs(tmp_path):
    cells = curve({0.25: 0.3, 0.5: 0.79, 0.75: 0.8, 1.0: 0.8}, seeds=5)
    sentence = said(tmp_path, cells, num_prompts=1000)

    assert sentence.startswith(
        "Yes, less than whole traces keeps at least 90 % of what whole traces teach: “first 50 % "
        "of each trace” keeps 98 % ("
    )
    assert "and takes 50 % of the computation, 58 % of the peak memory" in sentence


def test_no_names_the_nearest(tmp_path):
    sentence = said(tmp_path, curve({0.5: 0.4, 0.75: 0.5, 1.0: 0.8}, seeds=5))

    assert sentence.startswith(
        "No, nothing tried that is less than whole traces keeps at least 90 %"
    )
    assert "The nearest: “first 75 % of each trace” keeps 50 % (" in sentence


def test_what_cannot_be_told_says_what_would(tmp_path):
    sentence = said(tmp_path, curve({0.5: 0.72, 1.0: 0.8}), num_prompts=200)

    assert sentence.startswith(
        "Whether less than whole traces keeps at least 90 % of what whole traces "
    )
    assert "cannot be told with 3 seeds and 200 prompts; " in sentence
    assert " prompts or about " in sentence
    assert "The nearest: “first 50 % of each trace” keeps 87 % (" in sentence


@pytest.mark.slow
def test_equal_computation_is_compared_in_pairs(tmp_path):
    mixture = [
        ("mix", "mixture", s, {"lead_span": "0.375:4,1:1"}, 0.78 + s / 100) for s in range(3)
    ]
    thrift = [("half-steps", "half-steps", s, {"max_steps": 5}, 0.6 + s / 100) for s in range(3)]
    sentence = said(tmp_path / "1", [*curve({1.0: 0.8}), *mixture, *thrift])

    assert "Half the computation on “whole traces, half the steps” keeps 68 % (" in sentence
    assert (
        "for no more computation, “mixture: 80 % of the traces cut at 37.5 %, 20 % whole” is more "
        "accurate: +18.0 points ("
    ) in sentence
    worse = [("mix", "mixture", s, {"lead_span": "0.375:4,1:1"}, 0.5 + s / 100) for s in range(3)]
    assert "is less accurate: -10.0 points" in said(
        tmp_path / "2", [*curve({1.0: 0.8}), *worse, *thrift]
    )
    same = [("mix", "mixture", s, {"lead_span": "0.375:4,1:1"}, 0.605 + s / 100) for s in range(3)]
    assert "is no different as far as can be told: +" in said(
        tmp_path / "3", [*curve({1.0: 0.8}), *same, *thrift]
    )


@pytest.mark.slow
def test_without_a_gain_it_is_the_accuracy_that_is_kept(tmp_path):
    no_gain = said(tmp_path / "1", curve({0.5: 0.2, 1.0: 0.21}, base=0.2))

    assert "of the full-length accuracy (no gain over the untrained student can be told)" in no_gain
    assert "no full-length cell" in said(tmp_path / "2", curve({0.5: 0.2}))
    assert "no lead span below 1" in said(tmp_path / "3", curve({1.0: 0.2}))
    nothing = said(tmp_path / "4", curve({0.5: 0.0, 1.0: 0.0}, seeds=1, base=0.0))
    assert "cannot be told from zero" in nothing
