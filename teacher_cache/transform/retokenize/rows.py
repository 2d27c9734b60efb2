"""Turns masses of tokens into the entries that a cache keeps.

Letters: M tokens of the student, C contributions, U distinct tokens of all rows, E kept entries.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format import LOGIT_GRID, TAIL_FLOOR, KeepPolicy
from teacher_cache.format.codec import MAX_GAP, logit_codes, round_to_bfloat16
from teacher_cache.transform.retokenize.alignment import FIXED_POINT, exact_cumsum, summed
from teacher_cache.transform.retokenize.distribution import Contributions

_PLACE_BITS, _TOKEN_BITS = 25, 20
MAX_VOCABULARY = 1 << _TOKEN_BITS
MAX_ROWS = 1 << (63 - _PLACE_BITS - _TOKEN_BITS)
MAX_CONTRIBUTIONS = 1 << _PLACE_BITS


@dataclass(frozen=True)
class Rows:
    """Kept entries of M tokens, as in `Trace`, and the probability of each token itself."""

    k: NDArray[np.uint8]  # [M]
    top_ids: NDArray[np.int32]  # [E]
    top_logits: NDArray[np.float32]  # [E], on the grid
    tail_logit: NDArray[np.float32]  # [M], bfloat16 values
    realised: NDArray[np.float64]  # [M] the token's own mass, before rounding; 0 without a row
    is_clamped_tail: NDArray[np.bool_]  # [M] raised to TAIL_FLOOR
    num_clamped_logits: NDArray[np.int64]  # [M]


def keep(found: Contributions, realised: NDArray[np.int64], policy: KeepPolicy) -> Rows:
    """Sum, sort, cut and encode the masses of every row.

    A distribution already cut by the teacher's policy is not cut again by mass, as its
    rounded probabilities add nothing; a combined distribution is.

    Args:
        found: Masses and tails of the tokens.
        realised: [M] the target token of each row, which is always kept.
        policy: The adaptive rule.
    """
    num_rows = len(found.tail)
    row, token, mass, place = _summed(found)
    is_first = np.ones(len(row), bool)
    is_first[1:] = row[1:] != row[:-1]
    firsts = np.flatnonzero(is_first)
    group = np.cumsum(is_first) - 1
    if len(row):
        largest = np.maximum.reduceat(mass, firsts)
        gaps = np.log(mass / largest[group])
    else:
        gaps = np.zeros(0)
    codes = logit_codes(np.minimum(gaps, 0.0).astype(np.float32))
    # Most probable first; ties in the teacher's order.
    keys = (group << (8 + _PLACE_BITS)) | (codes.astype(np.int64) << _PLACE_BITS) | place
    order = np.argsort(keys)
    token, mass, codes, gaps = token[order], mass[order], codes[order], gaps[order]

    number = np.arange(len(row)) - firsts[group]
    sums = np.concatenate([[0], exact_cumsum(mass)[:-1]])
    before = (sums - sums[firsts][group]) / FIXED_POINT
    is_own = token == realised[row]
    is_kept = (number < policy.top_k) & (found.is_plain[row] | (before < policy.enough))
    is_kept |= is_own
    cut = summed(row, mass * ~is_kept, num_rows)
    own = np.zeros(num_rows)
    own[row[is_own]] = mass[is_own]
    tail = found.tail + cut
    is_clamped = found.has_row & (tail < TAIL_FLOOR)
    kept_rows = row[is_kept]
    return Rows(
        k=np.bincount(kept_rows, minlength=num_rows).astype(np.uint8),
        top_ids=token[is_kept].astype(np.int32),
        top_logits=LOGIT_GRID[codes[is_kept]],
        tail_logit=np.where(found.has_row, _logit(tail), np.float32(0)),
        realised=own,
        is_clamped_tail=is_clamped,
        num_clamped_logits=np.bincount(
            kept_rows[gaps[is_kept] < -MAX_GAP], minlength=num_rows
        ).astype(np.int64),
    )


def _summed(
    found: Contributions,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """[U] row, token, mass and first position of every token with mass, sorted by row and token."""
    is_some = np.flatnonzero(found.mass > 0)
    if len(is_some) > MAX_CONTRIBUTIONS or len(found.tail) > MAX_ROWS:
        raise ValueError(f"{len(is_some)} masses of {len(found.tail)} tokens in one batch")
    keys = (found.row[is_some] << _TOKEN_BITS) | found.token[is_some]
    # Sorting integers is several times faster than argsort.
    packed = np.sort((keys << _PLACE_BITS) | np.arange(len(keys)))
    places = packed & (MAX_CONTRIBUTIONS - 1)
    packed >>= _PLACE_BITS
    is_new = np.ones(len(packed), bool)
    is_new[1:] = packed[1:] != packed[:-1]
    starts = np.flatnonzero(is_new)
    mass = found.mass[is_some][places]
    summed = np.add.reduceat(mass, starts) if len(starts) else mass
    unique = packed[starts]
    return unique >> _TOKEN_BITS, unique & (MAX_VOCABULARY - 1), summed, places[starts]


def _logit(tail: NDArray[np.float64]) -> NDArray[np.float32]:
    inside = np.clip(tail, TAIL_FLOOR, 1 - TAIL_FLOOR)
    return round_to_bfloat16((np.log(inside) - np.log1p(-inside)).astype(np.float32))
