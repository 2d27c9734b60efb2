"""The order of an epoch: a pure function of seed, epoch, window and chosen traces.

The shards are permuted, and the traces of each are spread at random over a window of the epoch.
Ranks do not enter it: see `dealing`; nor does what is read of a trace, nor what waits where.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from student_train.data.mixture import drawn
from student_train.data.traces import TrainingData

# Neighbours in a shard end up half as far apart as in a full permutation (0.53 to 0.56 times with
# 200 shards and more), and about a third of an epoch waits for its turn at most;
# of fewer shards more, up to nearly all of fifty or fewer.
SHUFFLE_WINDOW = 0.42
MIN_WINDOW_SHARDS = 50  # so many or fewer are permuted as a whole
MIN_MIXED_SHARDS = 10  # of the first and of the last traces of an epoch


@dataclass(frozen=True)
class EpochOrder:
    """One epoch's sequence of n traces; the arrays run parallel."""

    # [n] the trace's shard, counted through all caches; S higher for each further pass over a
    # mixed cache, since its shards are then read again.
    shard: NDArray[np.int64]
    row: NDArray[np.int64]  # [n] its row there

    def __len__(self) -> int:
        return len(self.shard)


def data_order(
    data: TrainingData, *, seed: int, epoch: int, window: float = SHUFFLE_WINDOW
) -> EpochOrder:
    """The order of an epoch over the traces that are trained on; reads nothing."""
    shard, row = _epoch_places(data, seed, epoch)
    return epoch_order(
        shard, row, seed=seed, epoch=epoch, fingerprint=data.fingerprint, window=window
    )


def _epoch_places(
    data: TrainingData, seed: int, epoch: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Shard and row of every trace of an epoch; see EpochOrder for how shards are counted."""
    shards, rows, first = [], [], 0
    for source, share in zip(data.sources, data.shares_of_epoch, strict=True):
        shard, row = source.train.shard, source.train.row
        turn = np.zeros(len(shard), np.int64)
        if data.weights is not None:
            rng = _generator(f"mixture/{seed}/{source.cache.fingerprint}")
            draw = drawn(shard, share, epoch, rng)
            shard, row, turn = shard[draw.index], row[draw.index], draw.turn
        shards.append(first + shard + turn * data.num_shards)
        rows.append(row)
        first += len(source.cache.shards)
    return np.concatenate(shards), np.concatenate(rows)


def epoch_order(
    shard: NDArray[np.int64],
    row: NDArray[np.int64],
    *,
    seed: int,
    epoch: int,
    fingerprint: str,
    window: float = SHUFFLE_WINDOW,
) -> EpochOrder:
    """Shuffle traces through a window of shards.

    Args:
        shard: [n] each trace's shard.
        row: [n] its row in that shard.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
        fingerprint: Fingerprint of the data.
        window: Share of the shards, above 0 and at most 1, that are mixed at any time; as many as
            MIN_WINDOW_SHARDS are at least.

    Returns:
        Every trace exactly once; the same for the same arguments, on every machine.
    """
    rng = _generator(f"{seed}/{epoch}/{fingerprint}")
    shards, shard_of_trace = np.unique(shard, return_inverse=True)
    # Sorting random numbers, because numpy does not promise that `permutation` stays the same.
    permuted = np.argsort(rng.random(len(shards)), kind="stable")
    width = min(1.0, max(window, MIN_WINDOW_SHARDS / len(shards)))
    start = np.zeros(len(shards), np.float64)
    start[permuted] = _window_starts(len(shards), width)
    keys = start[shard_of_trace] + width * rng.random(len(shard))
    order = np.argsort(keys, kind="stable")
    return EpochOrder(shard[order], row[order])


def _window_starts(num_shards: int, width: float) -> NDArray[np.float64]:
    """[shards] Where in [0, 1 - width] each shard's window starts, evenly and in rising order.

    The first MIN_MIXED_SHARDS start together, and the last: an epoch neither begins nor ends with
    the traces of one shard. All others start one by one, so that reading is spread over the epoch.
    """
    if width == 1.0:
        return np.zeros(num_shards, np.float64)
    steps = np.arange(num_shards) - (MIN_MIXED_SHARDS - 1)
    last = num_shards - 1 - 2 * (MIN_MIXED_SHARDS - 1)
    return np.asarray((1.0 - width) * np.clip(steps / last, 0.0, 1.0))


def _generator(text: str) -> np.random.Generator:
    digest = hashlib.sha256(text.encode()).digest()
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(digest))))
