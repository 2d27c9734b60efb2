import numpy as np
import pytest
from fakes import make_cache, make_traces
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.data.due import most_waiting
from student_train.data.order import (
    MIN_MIXED_SHARDS,
    MIN_WINDOW_SHARDS,
    SHUFFLE_WINDOW,
    data_order,
    epoch_order,
)
from student_train.data.traces import open_data
from teacher_cache.format import open_cache


def shuffle_quality(order):
    """Mean distance in an epoch of neighbours in a shard, relative to a full permutation's."""
    place = {there: number for number, there in enumerate(places(order))}
    distances = [abs(n - place[s, r + 1]) for (s, r), n in place.items() if (s, r + 1) in place]
    return np.mean(distances) / ((len(order) + 1) / 3)


shard_sizes = st.lists(st.integers(1, 12), min_size=1, max_size=90)
windows = st.floats(0.01, 1.0)


def order_of(sizes, *, seed=0, epoch=0, fingerprint="f", window=SHUFFLE_WINDOW):
    shard = np.repeat(np.arange(len(sizes)), sizes)
    row = np.concatenate([np.arange(size) for size in sizes])
    return epoch_order(shard, row, seed=seed, epoch=epoch, fingerprint=fingerprint, window=window)


def places(order):
    return list(zip(order.shard.tolist(), order.row.tolist(), strict=True))


@given(shard_sizes, windows, st.integers(0, 5))
def test_every_trace_comes_exactly_once(sizes, window, epoch):
    order = order_of(sizes, window=window, epoch=epoch)

    expected = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    assert sorted(places(order)) == expected


@given(shard_sizes, windows)
def test_order_is_a_pure_function_of_its_arguments(sizes, window):
    np.random.seed(0)  # the global generator must not matter
    first = places(order_of(sizes, seed=3, epoch=2, window=window))
    np.random.seed(1)
    assert first == places(order_of(sizes, seed=3, epoch=2, window=window))


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"epoch": 1}, {"fingerprint": "g"}, {"window": 0.9}]
)
def test_order_changes_with_each_argument(change):
    sizes = [10] * 80

    assert places(order_of(sizes)) != places(order_of(sizes, **change))


def test_order_stays_what_it_was_in_earlier_versions():
    # A changed order would silently break the resuming of runs.
    order = order_of([3, 2, 4], seed=5, epoch=1, fingerprint="abc")
    many = order_of([2] * 70, seed=5, epoch=1, fingerprint="abc")

    assert places(order) == [(2, 3), (0, 1), (2, 0), (2, 1), (1, 1), (0, 2), (1, 0), (2, 2), (0, 0)]
    assert places(many)[:5] == [(40, 0), (54, 0), (44, 0), (23, 0), (15, 1)]


@settings(max_examples=30, derandomize=True)  # first and last places are random
@given(st.lists(st.integers(8, 40), min_size=30, max_size=80), windows)
def test_at_least_ten_shards_are_mixed_everywhere(sizes, window):
    order = order_of(sizes, window=window)

    first = np.array([np.flatnonzero(order.shard == s)[0] for s in range(len(sizes))])
    last = np.array([np.flatnonzero(order.shard == s)[-1] for s in range(len(sizes))])
    middle = range(len(order) // 4, len(order) * 3 // 4)
    assert min(np.sum((first <= place) & (place <= last)) for place in middle) >= 20
    for end in (order.shard[:64], order.shard[-64:]):
        assert len(set(end.tolist())) >= MIN_MIXED_SHARDS


@pytest.mark.slow
@given(st.lists(st.integers(1, 60), min_size=51, max_size=400), st.integers(0, 9))
def test_shards_of_any_size_are_open_for_at_most_their_window(sizes, seed):
    """So many wait at once: the bound of memory and disk, whatever the shards are."""
    order = order_of(sizes, seed=seed)
    width = max(SHUFFLE_WINDOW, MIN_WINDOW_SHARDS / len(sizes))
    first = np.array([np.flatnonzero(order.shard == s)[0] for s in range(len(sizes))])
    last = np.array([np.flatnonzero(order.shard == s)[-1] for s in range(len(sizes))])
    num_open = max(np.sum((first <= place) & (place < last)) for place in range(0, len(order), 97))
    # With a window of w, w / (1 - w) of the shards may be open in the middle of an epoch.
    assert num_open <= len(sizes) * min(1.0, width / (1 - width)) + MIN_MIXED_SHARDS


@pytest.mark.parametrize("num_shards", [20, 100, 200, 1000, 10_000])
def test_neighbours_end_up_half_as_far_apart_as_in_a_permutation(num_shards):
    order = order_of([20] * num_shards)

    assert shuffle_quality(order) >= 0.5
    waiting = most_waiting(order.shard, np.ones(len(order))) / len(order)
    assert num_shards <= 100 or waiting < 0.38


def test_a_wider_window_is_a_full_permutation():
    order = order_of([20] * 1000, window=1.0)

    assert shuffle_quality(order) == pytest.approx(1, abs=0.05)


def test_few_shards_are_shuffled_as_a_whole():
    order = order_of([200] * 4)

    quarters = np.array_split(order.shard, 4)
    counts = np.array([np.bincount(quarter, minlength=4) for quarter in quarters])
    assert counts.min() > 30  # of 50 expected


def test_order_of_a_cache_holds_its_traces(tmp_path):
    path = make_cache(tmp_path / "cache", make_traces(10))
    order = data_order(open_data([path]), seed=0, epoch=0)

    assert sorted(places(order)) == sorted(open_cache(path).traces)
