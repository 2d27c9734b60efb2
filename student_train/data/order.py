"""The order of an epoch: a pure function of seed, epoch and chosen traces.

Shards are dealt to lanes, balanced by tokens; each lane shuffles its traces through a window of
shards; the lanes are interleaved into one sequence. Ranks do not enter it: see `dealing`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from student_train.data.mixture import drawn
from student_train.data.traces import TrainingData

MIN_MIXED_SHARDS = 10
NUM_LANES = 8  # another number would be another order


@dataclass(frozen=True)
class EpochOrder:
    """One epoch's sequence of n traces; the arrays run parallel."""

    # [n] the trace's shard, counted through all caches; S higher for each further pass over a
    # mixed cache, since its shards are then read again.
    shard: NDArray[np.int64]
    row: NDArray[np.int64]  # [n] its row there

    def __len__(self) -> int:
        return len(self.shard)


def data_order(data: TrainingData, *, seed: int, epoch: int) -> EpochOrder:
    """The order of an epoch over the traces that are trained on; reads nothing."""
    shard, row = _epoch_places(data, seed, epoch)
    # Whole traces, whatever the lead span: truncation must not change what a step holds.
    num_tokens = data.lengths(shard % data.num_shards, row)
    return epoch_order(shard, row, num_tokens, seed=seed, epoch=epoch, fingerprint=data.fingerprint)


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
    num_tokens: NDArray[np.int64],
    *,
    seed: int,
    epoch: int,
    fingerprint: str,
    num_lanes: int = NUM_LANES,
) -> EpochOrder:
    """Shuffle traces so that at least MIN_MIXED_SHARDS shards are mixed at any time.

    Args:
        shard: [n] each trace's shard.
        row: [n] its row in that shard.
        num_tokens: [n] its length, by which lanes are balanced.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
        fingerprint: Fingerprint of the data.
        num_lanes: Number of lanes.

    Returns:
        Every trace exactly once; the same for the same arguments, on every machine.
    """
    rng = _generator(f"{seed}/{epoch}/{fingerprint}/{num_lanes}")
    shards, shard_of_trace = np.unique(shard, return_inverse=True)
    shard_tokens = np.zeros(len(shards), np.int64)
    np.add.at(shard_tokens, shard_of_trace, num_tokens)
    lanes = _deal(shard_tokens, num_lanes, rng)
    window = _window([len(lane) for lane in lanes])

    lane_of_shard = np.zeros(len(shards), np.int64)
    uniform = rng.random(len(shard))
    starts = np.zeros(len(shards), np.float64)
    widths = np.zeros(len(shards), np.float64)
    for number, lane in enumerate(lanes):
        lane_of_shard[lane] = number
        # A shard's traces spread evenly over 2 * window - 1 places around its own, moved inwards at
        # the ends: everywhere at least `window` shards are mixed, with equal weights.
        width = min(2 * window - 1, len(lane))
        starts[lane] = np.clip(np.arange(len(lane)) - width // 2, 0, len(lane) - width)
        widths[lane] = width
    keys = starts[shard_of_trace] + widths[shard_of_trace] * uniform  # a time in its lane
    lane_of_trace = lane_of_shard[shard_of_trace]

    # Interleave in proportion, so that every lane lasts to the end of the epoch.
    offsets = rng.random(num_lanes)
    by_lane = np.lexsort((keys, lane_of_trace))
    lengths = np.bincount(lane_of_trace, minlength=num_lanes)
    place_in_lane = np.arange(len(shard)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    sorted_lane = lane_of_trace[by_lane]
    times = (place_in_lane + offsets[sorted_lane]) / lengths[sorted_lane]
    order = by_lane[np.argsort(times, kind="stable")]
    return EpochOrder(shard[order], row[order])


def _generator(text: str) -> np.random.Generator:
    digest = hashlib.sha256(text.encode()).digest()
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(digest))))


def _deal(
    shard_tokens: NDArray[np.int64], num_lanes: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Permute the shards and give each to the lane that has the fewest tokens so far."""
    # Sorting random numbers, because numpy does not promise that `permutation` stays the same.
    permuted = np.argsort(rng.random(len(shard_tokens)), kind="stable")
    loads = np.zeros(num_lanes, np.int64)
    lanes: list[list[int]] = [[] for _ in range(num_lanes)]
    for shard in permuted:
        lane = int(np.argmin(loads))
        lanes[lane].append(int(shard))
        loads[lane] += shard_tokens[shard]
    return [np.array(lane, np.int64) for lane in lanes]


def _window(lane_lengths: Sequence[int]) -> int:
    """Smallest window with which the lanes together mix MIN_MIXED_SHARDS shards (or all)."""
    wanted = min(MIN_MIXED_SHARDS, sum(lane_lengths))
    window = 2  # with 1 the shards of a lane would follow each other unmixed
    while sum(min(window, length) for length in lane_lengths) < wanted:
        window += 1
    return window
