from dataclasses import replace

import numpy as np
import pytest
from caches import assert_same
from fakes import make_traces
from hypothesis import given
from hypothesis import strategies as st

from student_train.data.dealing import deal, dealt_by_length
from student_train.data.exchange import packed, unpacked
from teacher_cache.format import OPTIONAL_COLUMNS

lengths = st.lists(st.integers(0, 9000), max_size=80)


@given(lengths, st.integers(1, 17))
def test_no_rank_has_more_than_another_by_more_than_its_last_trace(num_tokens, num_ranks):
    ranks = dealt_by_length(num_tokens, num_ranks)

    assert len(ranks) == len(num_tokens)
    loads = [0] * num_ranks
    shortest = [0] * num_ranks
    for tokens, rank in sorted(zip(num_tokens, ranks, strict=True), reverse=True):
        loads[rank] += tokens
        shortest[rank] = tokens
    for load, last in zip(loads, shortest, strict=True):
        assert load - last <= min(loads)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=90), st.integers(1, 9), st.booleans())
def test_each_shard_is_read_by_one_rank_where_traces_can_be_exchanged(shards, num_ranks, can):
    shard, num_tokens = np.array(shards), np.arange(len(shards)) + 1
    dealing = deal(shard, num_tokens, batch_traces=7, num_ranks=num_ranks, can_exchange=can)

    assert len(dealing.reader) == len(dealing.trainer) == len(shard)
    if not can:
        assert (dealing.reader == dealing.trainer).all()
        return
    pairs = set(zip(shard.tolist(), dealing.reader.tolist(), strict=True))
    assert len(pairs) == len(set(shards))
    for first in range(0, len(shard), 7):
        batch = slice(first, first + 7)
        alone = dealt_by_length(num_tokens[batch].tolist(), num_ranks)
        assert dealing.trainer[batch].tolist() == alone


@pytest.mark.parametrize(("batch_traces", "num_ranks", "least"), [(64, 8, 0.97), (256, 16, 0.98)])
def test_ranks_are_busy_most_of_the_time(batch_traces, num_ranks, least):
    num_tokens = np.exp(np.random.default_rng(0).normal(8.0, 0.8, 4096)).astype(int)
    means, largest = 0.0, 0
    for batch in num_tokens.reshape(-1, batch_traces):
        ranks = dealt_by_length(batch.tolist(), num_ranks)
        loads = np.bincount(ranks, weights=batch, minlength=num_ranks)
        means, largest = means + loads.mean(), largest + loads.max()
    assert means / largest >= least


def test_traces_survive_the_way_from_rank_to_rank():
    traces = make_traces(5, lengths=(1, 40))
    traces[2] = traces[2][:1]  # no entries
    column = np.linspace(-1, 0, len(traces[3]), dtype=np.float32)
    traces[3] = replace(traces[3], chunk_logprob=column)
    traces[4] = replace(traces[4], student_logprob=-np.arange(len(traces[4]), dtype=np.float32))
    again = unpacked(packed(traces), traces)

    for trace, received in zip(traces, again, strict=True):
        assert_same(received, trace)
        for name in OPTIONAL_COLUMNS:
            np.testing.assert_array_equal(getattr(received, name), getattr(trace, name))
    assert unpacked(packed([]), []) == []
