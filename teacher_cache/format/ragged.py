"""Rows of different lengths stored flat in one array, and the probability of the tail.

Letters: R rows (tokens), E entries of all rows.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def entry_offsets(k: ArrayLike) -> NDArray[np.int64]:
    """[R + 1] start of each row's entries: those of row r are offsets[r]:offsets[r + 1]."""
    lengths = np.asarray(k)
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, dtype=np.int64, out=offsets[1:])
    return offsets


def row_of_entry(k: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """[E] the row that each entry belongs to."""
    return np.repeat(np.arange(len(k)), k)


def tail_mass(tail_logit: NDArray[np.float32]) -> NDArray[np.float64]:
    """[R] probability outside the kept entries, from its logit, without overflow."""
    mass: NDArray[np.float64] = np.exp(-np.logaddexp(0.0, -tail_logit.astype(np.float64)))
    return mass
