import numpy as np
import pytest

from student_train.batch.packing import LAYOUTS, MAX_PADDING, plan_micro_batches

CAP = 16_384
MIXES = {
    "reasoning traces": lambda rng, n: np.clip(rng.lognormal(8.3, 0.8, n), 50, 32_768),
    "short ones": lambda rng, n: rng.integers(73, 164, n),
    "short and long": lambda rng, n: rng.integers(100, 3000, n),
    "many very short": lambda rng, n: np.clip(rng.lognormal(5.5, 0.8, n), 10, 32_768),
    "alike": lambda rng, n: np.full(n, 700),
}


def lengths_of(mix, num_traces):
    return MIXES[mix](np.random.default_rng(num_traces), num_traces).astype(int).tolist()


def widths_of(rows, lengths):
    return [sum(lengths[index] for index in row) for row in rows]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_traces", [1, 4, 16, 64, 300])
@pytest.mark.parametrize("mix", MIXES)
def test_padding_and_size_stay_under_their_limits_whatever_the_lengths(mix, num_traces, layout):
    lengths = lengths_of(mix, num_traces)
    plan = plan_micro_batches(lengths, CAP, layout)

    assert sorted(index for rows in plan for row in rows for index in row) == list(
        range(num_traces)
    )
    for rows in plan:
        widths = widths_of(rows, lengths)
        num_positions = len(rows) * max(widths)
        assert sum(widths) >= (1 - MAX_PADDING) * num_positions
        assert num_positions <= CAP or sum(len(row) for row in rows) == 1
        if layout == "alone":
            assert all(len(row) == 1 for row in rows)
        if layout == "flat":
            assert len(rows) == 1


@pytest.mark.parametrize("mix", ["short ones", "many very short"])
def test_packing_takes_fewer_forwards_without_much_wider_attention(mix):
    lengths = lengths_of(mix, 64)
    alone, packed = (plan_micro_batches(lengths, CAP, layout) for layout in ("alone", "packed"))
    # Of attention, per layer: rows times their width squared.
    costs = [
        sum(len(rows) * max(widths_of(rows, lengths)) ** 2 for rows in plan)
        for plan in (alone, packed)
    ]

    assert len(packed) <= len(alone) / 3
    assert costs[1] <= 2.5 * costs[0]


def test_traces_that_are_too_unlike_go_into_micro_batches_of_their_own():
    assert plan_micro_batches([5000, 9000, 1500], CAP, "packed") == [[[1]], [[0]], [[2]]]


def test_a_trace_longer_than_the_cap_goes_alone():
    for layout in LAYOUTS:
        assert plan_micro_batches([50, 90, 49], 60, layout)[0] == [[1]]


def test_the_plan_of_no_traces_is_empty():
    assert all(plan_micro_batches([], CAP, layout) == [] for layout in LAYOUTS)
