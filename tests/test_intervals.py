import random

import pytest

from student_train.evaluation.intervals import clustered_interval, wilson_interval


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
def test_wilson_interval_agrees_with_published_values(num_right, num_all, low, high):
    found = wilson_interval(num_right, num_all)

    assert found == pytest.approx((low, high), abs=5e-5)


def test_all_right_reaches_one():
    assert wilson_interval(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)


def test_one_sample_per_problem_gives_wilsons_interval():
    assert clustered_interval([1, 0, 1, 1, 0], 1) == wilson_interval(3, 5)


def test_several_samples_cluster_by_problem():
    # Means 1, 0.5, 0: p = 0.5, standard error sqrt(0.5 / (3 * 2)).
    low, high = clustered_interval([4, 2, 0], 4)

    assert (low, high) == (0.0, 1.0)
    low, high = clustered_interval([3, 2, 1, 2] * 10, 4)
    assert high - 0.5 == pytest.approx(1.959964 * (10 * 0.125 / (40 * 39)) ** 0.5)
    assert 0.5 - low == pytest.approx(high - 0.5)


def test_problems_that_are_all_alike_fall_back_on_wilson():
    assert clustered_interval([4, 4], 4) == wilson_interval(2, 2)


def test_the_clustered_interval_covers_the_truth():
    rng = random.Random(0)
    covered = 0
    for _ in range(400):
        problems = [rng.betavariate(1, 1) for _ in range(60)]
        low, high = clustered_interval(
            [sum(rng.random() < p for _ in range(4)) for p in problems], 4
        )
        covered += low <= 0.5 <= high
    assert 0.92 < covered / 400 < 0.98
