"""Who reads and who trains on each trace, where several ranks share every global batch.

Batches and their order are those of one rank. Within a batch, traces are dealt by length, so that
ranks are busy equally long; shards are dealt to be read, each by one rank, whoever trains on what
is in them.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Dealing:
    """Ranks for n traces in the order of an epoch; the arrays run parallel."""

    reader: NDArray[np.int64]  # [n] the rank that reads the trace
    trainer: NDArray[np.int64]  # [n] the rank that trains on it

    def reads(self, rank: int) -> NDArray[np.int64]:
        """Places of the traces that a rank reads."""
        return np.flatnonzero(self.reader == rank)


def deal(
    shard: NDArray[np.int64],
    num_tokens: NDArray[np.int64],
    *,
    batch_traces: int,
    num_ranks: int,
    can_exchange: bool,
) -> Dealing:
    """Deal traces to ranks; a pure function, so that every rank knows all of it.

    Args:
        shard: [n] shard of each trace.
        num_tokens: [n] tokens of each that are worked on.
        batch_traces: Traces of a global batch; the first begins with the first trace.
        num_ranks: Number of ranks.
        can_exchange: Whether traces can be handed from rank to rank. Else each rank reads what it
            trains on, and most shards are read by several.
    """
    firsts = range(0, len(shard), batch_traces)
    batches = [num_tokens[first : first + batch_traces].tolist() for first in firsts]
    trainer = np.array(
        [r for batch in batches for r in dealt_by_length(batch, num_ranks)], np.int64
    )
    if not can_exchange:
        return Dealing(trainer, trainer)
    shards, first_place, shard_of_trace, num_traces = np.unique(
        shard, return_index=True, return_inverse=True, return_counts=True
    )
    # In the order in which they are needed, so that ranks take turns reading.
    by_need = np.argsort(first_place, kind="stable")
    reader_of_shard = np.zeros(len(shards), np.int64)
    reader_of_shard[by_need] = _fewest_first(num_traces[by_need].tolist(), num_ranks)
    return Dealing(reader_of_shard[shard_of_trace], trainer)


def dealt_by_length(num_tokens: Sequence[int], num_ranks: int) -> list[int]:
    """Rank of each trace: the longest first, each to the rank with the fewest tokens so far."""
    longest_first = sorted(range(len(num_tokens)), key=lambda index: -num_tokens[index])  # stable
    ranks = _fewest_first([num_tokens[index] for index in longest_first], num_ranks)
    dealt = [0] * len(num_tokens)
    for index, rank in zip(longest_first, ranks, strict=True):
        dealt[index] = rank
    return dealt


def _fewest_first(loads: Sequence[int], num_ranks: int) -> list[int]:
    """Give each load in turn to the rank that has the least so far."""
    heap = [(0, rank) for rank in range(num_ranks)]
    ranks = []
    for load in loads:
        total, rank = heapq.heappop(heap)
        ranks.append(rank)
        heapq.heappush(heap, (total + load, rank))
    return ranks
