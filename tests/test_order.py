import numpy as np
import pytest
from fakes import make_cache, make_traces
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.data.order import MIN_MIXED_SHARDS, data_order, epoch_order
from student_train.data.traces import open_data
from teacher_cache.format import open_cache

shard_sizes = st.lists(st.integers(1, 12), min_size=1, max_size=30)


def order_of(sizes, *, seed=0, epoch=0, fingerprint="f", num_lanes=4):
    shard = np.repeat(np.arange(len(sizes)), sizes)
    row = np.concatenate([np.arange(size) for size in sizes])
    num_tokens = 50 + (shard * 7 + row * 13) % 100
    return epoch_order(
        shard, row, num_tokens, seed=seed, epoch=epoch, fingerprint=fingerprint, num_lanes=num_lanes
    )


def places(order):
    return list(zip(order.shard.tolist(), order.row.tolist(), strict=True))


@given(shard_sizes, st.integers(1, 16), st.integers(0, 5))
def test_every_trace_comes_exactly_once(sizes, num_lanes, epoch):
    order = order_of(sizes, num_lanes=num_lanes, epoch=epoch)

    expected = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    assert sorted(places(order)) == expected


@given(shard_sizes)
def test_order_is_a_pure_function_of_its_arguments(sizes):
    np.random.seed(0)  # the global generator must not matter
    first = places(order_of(sizes, seed=3, epoch=2))
    np.random.seed(1)
    assert first == places(order_of(sizes, seed=3, epoch=2))


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"fingerprint": "g"}])
def test_order_changes_with_each_argument(change):
    sizes = [10] * 12

    assert places(order_of(sizes)) != places(order_of(sizes, **change))


def test_order_stays_what_it_was_in_earlier_versions():
    # A changed order would silently break the resuming of runs.
    order = order_of([3, 2, 4], seed=5, epoch=1, fingerprint="abc", num_lanes=2)

    assert places(order) == [(2, 1), (0, 2), (1, 0), (2, 2), (0, 1), (2, 0), (1, 1), (2, 3), (0, 0)]


@settings(max_examples=30, derandomize=True)  # first and last places are random
@given(st.integers(1, 16), st.lists(st.integers(8, 40), min_size=20, max_size=40))
def test_at_least_ten_shards_are_mixed_everywhere(num_lanes, sizes):
    order = order_of(sizes, num_lanes=num_lanes)

    first = {shard: np.flatnonzero(order.shard == shard)[0] for shard in range(len(sizes))}
    last = {shard: np.flatnonzero(order.shard == shard)[-1] for shard in range(len(sizes))}
    middle = range(len(order) // 4, len(order) * 3 // 4)
    mixed = [sum(first[s] <= place <= last[s] for s in first) for place in middle]
    assert min(mixed) >= MIN_MIXED_SHARDS


def test_few_shards_are_shuffled_as_a_whole():
    order = order_of([200] * 4, num_lanes=1)

    quarters = np.array_split(order.shard, 4)
    counts = np.array([np.bincount(quarter, minlength=4) for quarter in quarters])
    assert counts.min() > 30  # of 50 expected


def test_order_of_a_cache_holds_its_traces(tmp_path):
    path = make_cache(tmp_path / "cache", make_traces(10))
    order = data_order(open_data([path]), seed=0, epoch=0)

    assert sorted(places(order)) == sorted(open_cache(path).traces)
