import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from student_train.data.mixture import drawn, shares_of_epoch

sizes = st.lists(st.integers(1, 60), min_size=1, max_size=5)


@given(sizes, st.data())
def test_shares_add_up_to_an_epoch_and_follow_the_weights(num_traces, data):
    weights = [data.draw(st.floats(0.1, 10)) for _ in num_traces]
    shares = shares_of_epoch(num_traces, weights)

    assert sum(shares) == sum(num_traces)
    exact = np.array(weights) / sum(weights) * sum(num_traces)
    assert np.abs(shares - exact).max() < 1


def test_shares_are_those_of_a_worked_example():
    assert shares_of_epoch([100, 20], [3, 1]) == [90, 30]
    assert shares_of_epoch([1, 1, 1], [1, 1, 1]) == [1, 1, 1]
    assert shares_of_epoch([5, 5], [1, 2]) == [3, 7]  # 3.33 and 6.67


@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 6))
def test_no_trace_is_drawn_twice_more_than_another(num_traces, share, num_epochs):
    shard = np.sort(np.random.default_rng(num_traces).integers(0, 5, num_traces))
    total = np.zeros(num_traces, int)
    for epoch in range(num_epochs):
        draw = drawn(shard, share, epoch, np.random.default_rng(7))
        of_epoch = np.bincount(draw.index, minlength=num_traces)
        assert of_epoch.sum() == share
        assert of_epoch.max() - of_epoch.min() <= 1
        pairs = set(zip(draw.index.tolist(), draw.turn.tolist(), strict=True))
        assert len(pairs) == share  # in one turn a trace comes once
        total += of_epoch
        assert total.max() - total.min() <= 1


@pytest.mark.parametrize("share", [5, 12])
def test_a_share_takes_whole_shards_as_far_as_it_goes(share):
    shard = np.repeat(np.arange(10), 4)
    draw = drawn(shard, share, 0, np.random.default_rng(1))

    assert len(set(shard[draw.index].tolist())) == -(-share // 4)
