import math
import random

import numpy as np
import pytest

from student_train.evaluation.intervals import (
    Mean,
    clustered_interval,
    share_interval,
    t_quantile,
    t_tail,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("num_right", "num_all", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_one_answer_per_prompt_has_the_published_wilson_interval(num_right, num_all, low, high):
    answers = [1] * num_right + [0] * (num_all - num_right)

    assert wilson_interval(num_right / num_all, num_all) == pytest.approx((low, high), abs=5e-5)
    assert clustered_interval(answers, 1) == pytest.approx((low, high), abs=5e-5)


def test_all_right_reaches_one():
    assert clustered_interval([1] * 20, 1) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)
    assert clustered_interval([4] * 20, 4) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)


def test_samples_that_agree_tell_no_more_than_one_and_independent_ones_do():
    alike = clustered_interval([4, 0] * 20, 4)
    random_ones = clustered_interval([2, 1, 3, 2] * 10, 4)

    assert alike == pytest.approx(clustered_interval([1, 0] * 20, 1))
    assert random_ones[1] - random_ones[0] < 0.6 * (alike[1] - alike[0])


@pytest.mark.parametrize(
    ("degrees", "quantile"),  # tables of Student's t at 0.975
    [(1, 12.7062), (2, 4.30265), (4, 2.77645), (10, 2.22814), (100, 1.98397), (math.inf, 1.95996)],
)
def test_students_quantiles_are_the_tables(degrees, quantile):
    assert t_quantile(0.975, degrees) == pytest.approx(quantile, rel=1e-5)
    assert t_tail(quantile, degrees) == pytest.approx(0.025, rel=1e-4)


def test_the_variance_of_a_mean_is_that_of_crossed_samples():
    # Seeds 0 and 2 apart, prompts 0 and 4 apart, nothing else: no rest.
    values_SP = np.array([[0.0, 4.0], [2.0, 6.0]])
    mean = Mean.of(values_SP)

    assert (mean.value, mean.rest_variance) == (3.0, 0.0)
    assert mean.seed_variance == pytest.approx(2.0)  # of 0 and 2
    assert mean.prompt_variance == pytest.approx(8.0)  # of 0 and 4
    assert mean.variance == pytest.approx(2.0 / 2 + 8.0 / 2)
    assert mean.degrees == pytest.approx(25.0)  # 1 * (5 / 1)^2


def test_a_difference_that_is_the_same_everywhere_is_certain():
    values_SP = np.random.default_rng(0).random((3, 50))

    assert Mean.of((values_SP + 0.1) - values_SP).p_value == pytest.approx(0.0, abs=1e-9)
    assert Mean.of(values_SP - values_SP).p_value == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("seed_spread", [0.0, 0.3])
def test_intervals_hold_the_truth_about_95_times_in_100(seed_spread):
    rng = np.random.default_rng(5)
    hard = np.random.default_rng(1).normal(0, 1.2, 400_000)
    seeds = np.random.default_rng(2).normal(0, seed_spread, 400_000)
    truth = float(np.mean(1 / (1 + np.exp(-(0.5 + seeds - hard)))))
    covered = 0
    for _ in range(200):
        logit_SP = 0.5 + rng.normal(0, seed_spread, (4, 1)) - rng.normal(0, 1.2, (1, 120))
        low, high = share_interval((rng.random((4, 120)) < 1 / (1 + np.exp(-logit_SP))) * 1.0)
        covered += low <= truth <= high
    assert 0.91 <= covered / 200 <= 0.99


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = random.Random(3)
    covered = 0
    for _ in range(200):
        skills = [generator.betavariate(2, 2) for _ in range(60)]
        num_right = [sum(generator.random() < skill for _ in range(4)) for skill in skills]
        low, high = clustered_interval(num_right, 4)
        covered += low <= 0.5 <= high
    assert 0.90 <= covered / 200 <= 0.98
