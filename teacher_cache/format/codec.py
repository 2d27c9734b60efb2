"""Encoding an engine's rows of logprobs for storage, and decoding them.

Letters: R rows (tokens with a distribution), K candidates per row, E kept entries of all rows.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format.ragged import row_of_entry

# Logprobs arrive as float32, which resolve the mass outside the kept entries to about 1e-7.
TAIL_FLOOR = 1e-7
_TINY = float(np.finfo(np.float32).tiny)

_SUMMED_BELOW = 1e-4  # a larger tail is 1 minus the kept mass to a thousandth, half a bfloat16 step

FINE_STEP = 1 / 32  # nats; a bfloat16 head's own rounding is of this size
STEP_GROWTH = 4.0  # nats over which the step grows by a factor of e: far entries weigh less
GROWTH_END = 16.0  # nats; evenly spaced from there on
MAX_GAP = 60.0  # nats below the largest logit

_FEW = 8  # candidates examined first: most rows of a confident teacher end there


def _logit_grid() -> NDArray[np.float32]:
    """153 values from 0 down to -60 nats: steps grow from 1/32 to 1.7."""
    gaps = [0.0]
    while gaps[-1] < MAX_GAP:
        gaps.append(gaps[-1] + FINE_STEP * float(np.exp(min(gaps[-1], GROWTH_END) / STEP_GROWTH)))
    gaps[-1] = MAX_GAP
    grid: NDArray[np.float32] = -np.array(gaps, np.float32)
    return grid


# The grid is each shard's own dictionary: readers take it from the file, writers from here.
LOGIT_GRID = _logit_grid()
_GAP_MIDPOINTS = np.append(-(LOGIT_GRID[1:] + LOGIT_GRID[:-1]) / 2, np.float32(np.inf))
# Cells of half a fine step, so each holds at most one midpoint: a look-up and one comparison
# find the nearest point, ten times faster than a binary search.
_CELLS_PER_NAT = int(2 / FINE_STEP)
_NUM_CELLS = int(MAX_GAP) * _CELLS_PER_NAT
_CODE_OF_CELL = np.searchsorted(
    _GAP_MIDPOINTS, (np.arange(_NUM_CELLS + 1) / _CELLS_PER_NAT).astype(np.float32), side="left"
).astype(np.uint8)


@dataclass(frozen=True)
class KeepPolicy:
    """Rule for a row's kept candidates: the fewest whose mass reaches `mass`, in 1..top_k.

    A mass of 1 keeps `top_k` of them. The target token is kept as well if it is not among them.
    """

    top_k: int
    mass: float

    @property
    def enough(self) -> float:
        """Mass of kept entries at which no more are needed.

        Only all entries have a mass of 1; logprobs of fewer, rounded, may seem to reach it.
        """
        return self.mass if self.mass < 1 else math.inf


@dataclass(frozen=True)
class KeptEntries:
    """The kept entries of R rows; see `Trace` for what the arrays mean."""

    k: NDArray[np.uint8]  # [R]
    top_ids: NDArray[np.int32]  # [E]
    top_logits: NDArray[np.float32]  # [E], on the grid
    tail_logit: NDArray[np.float32]  # [R], bfloat16 values
    num_clamped_tails: int  # tails below TAIL_FLOOR, raised to it
    num_clamped_logits: int  # entries further than MAX_GAP below the largest


def keep_entries(
    row_ids: NDArray[np.int32],
    row_logprobs: NDArray[np.float32],
    policy: KeepPolicy,
    row_tails: NDArray[np.float32] | None = None,
) -> KeptEntries:
    """Choose and encode the entries to keep of every row.

    Args:
        row_ids: [R, 1 + K], the target token, then the candidates by falling probability.
        row_logprobs: [R, 1 + K] nats, normalised over the whole vocabulary. -inf candidates are
            dropped; a target token at -inf is kept at the grid's far end.
        policy: The adaptive rule.
        row_tails: [R] logarithms of the mass outside the K candidates, NaN where unknown; a small
            tail is then a sum. Without them it is 1 minus the mass that is kept.
    """
    num_rows, width = row_ids.shape
    num_top, top_mass = _num_kept(row_logprobs[:, 1:], policy)
    is_apart = _realised_apart(row_ids, num_top)
    k = num_top + is_apart
    ends = k.cumsum()
    # Position of each entry in the flat rows: columns 1, 2, ... of its row, column 0 last
    # where the order by probability puts the target token if it is kept apart.
    first_places = np.arange(1, num_rows * width, width)
    places = (first_places - (ends - k)).repeat(k) + np.arange(int(k.sum()))
    places[ends[is_apart] - 1] = first_places[is_apart] - 1

    logprobs = row_logprobs.ravel().take(places)
    gaps = logprobs - row_logprobs[:, 1].repeat(k)
    top_mass[is_apart] += np.exp(row_logprobs[is_apart, 0], dtype=np.float64)
    tail = 1 - top_mass
    if row_tails is not None:
        small = ((tail < _SUMMED_BELOW) & ~np.isnan(row_tails)).nonzero()[0]
        if len(small):
            tail[small] = _summed_tails(
                *(each[small] for each in (row_ids, row_logprobs, row_tails, num_top, is_apart))
            )
            top_mass[small] = 1 - tail[small]
    return KeptEntries(
        k=k.astype(np.uint8),
        top_ids=row_ids.ravel().take(places),
        top_logits=LOGIT_GRID.take(logit_codes(gaps)),
        tail_logit=_logit_of(tail, top_mass),
        num_clamped_tails=int(np.count_nonzero(tail < TAIL_FLOOR)),
        num_clamped_logits=int(np.count_nonzero(gaps < -MAX_GAP)),
    )


def _summed_tails(
    row_ids: NDArray[np.int32],
    row_logprobs: NDArray[np.float32],
    row_tails: NDArray[np.float32],
    num_top: NDArray[np.int64],
    is_apart: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """[R] mass of all that is not kept: outside the candidates, and of those beyond `num_top`."""
    probs = np.exp(row_logprobs)
    mass: NDArray[np.float64] = np.exp(row_tails, dtype=np.float64)
    apart = is_apart.nonzero()[0]
    if len(apart):
        is_hit = row_ids[apart, 1:] == row_ids[apart, :1]
        hit, column = is_hit.nonzero()
        probs[apart[hit], 1 + column] = 0
        outside = apart[~is_hit.any(axis=1)]
        mass[outside] -= np.exp(row_logprobs[outside, 0], dtype=np.float64)
        np.maximum(mass, 0, out=mass)
    # Sums of each row's columns after its last kept one; a row that keeps all has none.
    num_rows, width = row_ids.shape
    begins = np.arange(1, num_rows * width, width) + num_top
    bounds = np.empty(2 * num_rows, np.intp)
    bounds[::2] = np.minimum(begins, num_rows * width - 1)
    bounds[1::2] = np.arange(width, num_rows * width + 1, width)
    beyond = np.add.reduceat(probs.ravel(), bounds[:-1])[::2]
    mass += np.where(num_top < width - 1, beyond, 0)
    return mass


def _num_kept(
    logprobs: NDArray[np.float32], policy: KeepPolicy
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """[R] number of the first candidates [R, K] that are kept, and their mass."""
    limit = min(policy.top_k, logprobs.shape[1])
    few = min(_FEW, limit)
    # Sums of one candidate of all rows at a time are several times as fast as of one row's.
    masses = np.exp(np.ascontiguousarray(logprobs[:, :few].T), dtype=np.float64)
    np.add.accumulate(masses, axis=0, out=masses)
    # If the mass is reached, the entry that reaches it and all before it are finite.
    num_below = np.add.reduce(masses < policy.enough, axis=0)
    num_top = np.minimum(num_below + 1, few)
    mass = masses[num_top - 1, np.arange(len(logprobs))]
    rows = (num_below == few).nonzero()[0]
    if len(rows):
        # The sum continues from here, so that it does not depend on `few`.
        sums = np.empty((len(rows), limit - few + 1))
        sums[:, 0] = masses[-1, rows]
        np.exp(logprobs[rows, few:limit], out=sums[:, 1:], dtype=np.float64)
        np.add.accumulate(sums, axis=1, out=sums)
        num_below = few + np.add.reduce(sums[:, 1:] < policy.enough, axis=1)
        num_finite = np.add.reduce(logprobs[rows, :limit] > -np.inf, axis=1)
        num_top[rows] = np.minimum(np.minimum(num_below + 1, limit), num_finite)
        mass[rows] = sums[np.arange(len(rows)), np.maximum(num_top[rows] - few, 0)]
    return num_top, mass


def _realised_apart(row_ids: NDArray[np.int32], num_top: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[R] whether the target token is not among the first `num_top` candidates of its row."""
    is_apart: NDArray[np.bool_] = row_ids[:, 1] != row_ids[:, 0]
    rows = is_apart.nonzero()[0]  # all others are the most probable token itself
    is_hit = row_ids[rows, 1:] == row_ids[rows, :1]
    place = is_hit.argmax(axis=1)
    is_apart[rows] = ~is_hit.any(axis=1) | (place >= num_top[rows])
    return is_apart


def logit_codes(top_logits: NDArray[np.float32]) -> NDArray[np.uint8]:
    """[E] nearest points of LOGIT_GRID; exact for values that are on it."""
    gaps = -top_logits
    cells = np.minimum(gaps * np.float32(_CELLS_PER_NAT), np.float32(_NUM_CELLS)).astype(np.intp)
    codes: NDArray[np.uint8] = _CODE_OF_CELL[cells]
    codes += gaps > _GAP_MIDPOINTS[codes]
    return codes


def tail_logit_of(kept_mass: NDArray[np.float64]) -> NDArray[np.float32]:
    """[R] log(tail / (1 - tail)) in bfloat16; tail = 1 - kept_mass, at least TAIL_FLOOR."""
    return _logit_of(1 - kept_mass, kept_mass)


def _logit_of(tail: NDArray[np.float64], kept_mass: NDArray[np.float64]) -> NDArray[np.float32]:
    """[R] the same of a tail that may be known better than as 1 - kept_mass."""
    outside = np.log(np.maximum(tail, TAIL_FLOOR))
    inside = np.log(np.minimum(np.maximum(kept_mass, _TINY), 1 - TAIL_FLOOR))
    return round_to_bfloat16((outside - inside).astype(np.float32))


def is_clamped_tail(tail_logit: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Mask of stored tails that are at TAIL_FLOOR."""
    clamped: NDArray[np.bool_] = tail_logit <= tail_logit_of(np.ones(1))[0]
    return clamped


def round_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Finite float32 values rounded to the nearest bfloat16 (ties to even): zeros compress."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


def stored_logprobs(
    k: NDArray[np.uint8], top_logits: NDArray[np.float32], tail_logit: NDArray[np.float32]
) -> NDArray[np.float64]:
    """[E] logprobs of the kept entries: top_logits - logsumexp(top_logits) + log(1 - tail).

    With the tail they sum to one in every row.
    """
    rows = row_of_entry(k)
    logits = top_logits.astype(np.float64)
    sums = np.bincount(rows, weights=np.exp(logits), minlength=len(k))
    log_inside = -np.logaddexp(0.0, tail_logit.astype(np.float64))
    with np.errstate(divide="ignore"):  # rows without entries, which are not used below
        offset = log_inside - np.log(sums)
    logprobs: NDArray[np.float64] = logits + offset[rows]
    return logprobs
