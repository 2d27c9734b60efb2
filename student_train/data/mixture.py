"""Choice of the traces of an epoch where several caches are mixed by weights.

An epoch always has as many traces as all caches together. A weight is a share of them: with weights
3 and 1, three of four traces of an epoch come from the first cache. A cache whose share is larger
than the cache is repeated from its start; one whose share is smaller continues in the next epoch
where it stopped: the numbers of visits of a cache's traces differ by at most one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Draw:
    """Traces of one cache in one epoch; the arrays run parallel."""

    index: NDArray[np.int64]  # index of the trace among those of its cache
    turn: NDArray[np.int64]  # complete passes over its cache before, in this epoch


def shares_of_epoch(num_traces: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Number of traces that each cache gives to an epoch; together, as many as there are.

    Args:
        num_traces: Number of traces of each cache.
        weights: Weight of each cache, positive.

    Returns:
        Shares in proportion to the weights, rounded so that the largest remainders gain.
    """
    total = sum(num_traces)
    exact = np.array(weights, np.float64) / sum(weights) * total
    shares = np.floor(exact).astype(np.int64)
    gains = np.argsort(shares - exact, kind="stable")[: total - shares.sum()]
    shares[gains] += 1
    return [int(share) for share in shares]


def drawn(shard: NDArray[np.int64], share: int, epoch: int, rng: np.random.Generator) -> Draw:
    """The traces that a cache gives to an epoch: the next `share` of an endless round.

    The round goes shard by shard, so that a share of the traces costs that share of the bytes.

    Args:
        shard: [n] each trace's shard.
        share: Number of traces per epoch.
        epoch: Number of the epoch, from 0.
        rng: Random generator, the same for every epoch of a run.
    """
    shards, shard_of_trace = np.unique(shard, return_inverse=True)
    round_of_cache = np.argsort(rng.random(len(shards))[shard_of_trace], kind="stable")
    places = np.arange(epoch * share, (epoch + 1) * share)
    turns = places // len(shard)
    return Draw(round_of_cache[places % len(shard)], turns - turns[0])
