"""Distances of distributions from an engine's rows.

Letters: R rows (tokens with a distribution), K candidates per row, E kept entries of all rows,
V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format import TAIL_FLOOR, entry_offsets, row_of_entry

_Floats = NDArray[np.float64]
ROWS_AT_ONCE = 64  # [64, V] float32 are 39 MB at V = 152k


@dataclass(frozen=True)
class LiveRows:
    """Rows of an engine: column 0 is the token itself, 1..K are candidates, most probable first."""

    ids: NDArray[np.int32]  # [R, 1 + K]
    logprobs: NDArray[np.float32]  # [R, 1 + K]

    def part(self, rows: slice | NDArray[np.int64]) -> "LiveRows":
        """Select some of the rows."""
        return LiveRows(self.ids[rows], self.logprobs[rows])


def logprobs_at(
    live: LiveRows, k: NDArray[np.uint8], ids: NDArray[np.int32]
) -> tuple[_Floats, NDArray[np.bool_]]:
    """Look up given ids in rows.

    Args:
        live: R rows of an engine.
        k: [R] number of ids looked up in each row.
        ids: [E] flat.

    Returns:
        [E] logprobs in nats, and [E] whether an id is among its row's candidates; if it is not,
        its logprob is at most the least candidate's, which is returned.
    """
    found = np.empty(len(ids))
    num_ids = 1 + int(max(live.ids.max(initial=0), ids.max(initial=0)))
    dense = np.full((ROWS_AT_ONCE, num_ids), np.nan, np.float32)
    least = live.logprobs[:, 1:].min(axis=1)
    ends = entry_offsets(k)
    for first in range(0, len(k), ROWS_AT_ONCE):
        part = live.part(slice(first, first + ROWS_AT_ONCE))
        rows = np.arange(len(part.ids))
        dense[rows[:, None], part.ids] = part.logprobs
        entries = slice(int(ends[first]), int(ends[first + len(rows)]))
        found[entries] = dense[np.repeat(rows, k[first : first + len(rows)]), ids[entries]]
        dense[rows[:, None], part.ids] = np.nan
    is_there = ~np.isnan(found)
    return np.where(is_there, found, np.repeat(least, k)), is_there


def tails(k: NDArray[np.uint8], logprobs: _Floats) -> _Floats:
    """[R] mass outside some entries, at least the smallest that a cache can represent."""
    inside = np.bincount(row_of_entry(k), weights=np.exp(logprobs), minlength=len(k))
    return np.clip(1 - inside, TAIL_FLOOR, None)


def divergence(
    k: NDArray[np.uint8], p_logprobs: _Floats, p_tail: _Floats, q_logprobs: _Floats, q_tail: _Floats
) -> _Floats:
    """[R] KL(p || q) in nats over the kept entries and one bucket for the tail."""
    terms = np.exp(p_logprobs) * (p_logprobs - q_logprobs)
    of_entries = np.bincount(row_of_entry(k), weights=terms, minlength=len(k))
    result: _Floats = of_entries + p_tail * (np.log(p_tail) - np.log(q_tail))
    return result
