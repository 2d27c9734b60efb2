"""The teacher's distributions of some tokens: ragged in a trace, a rectangle for the loss.

Letters: N tokens, E kept entries of all of them, K kept entries of the widest.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from student_train.losses import TeacherTargets
from teacher_cache.format import Trace, entry_offsets

_Value = TypeVar("_Value", bound=np.generic)


def targets_of(tokens: Sequence[tuple[Trace, NDArray[np.int64]]]) -> TeacherTargets:
    """Targets of these tokens of these traces, at least one token in all; integers are int32.

    Tokens without a distribution have themselves as the only entry, and k = 0.
    """
    k, tails, target_ids, ids, logits = [], [], [], [], []
    for trace, valid in tokens:
        k.append(trace.k[valid])
        tails.append(trace.tail_logit[valid])
        target_ids.append(trace.token_ids[valid])
        entries = _entries_of(trace, valid)
        ids.append(trace.top_ids[entries])
        logits.append(trace.top_logits[entries])
    k_N = np.concatenate(k).astype(np.int32)
    targets_N = np.concatenate(target_ids)
    width = max(1, int(k_N.max()))
    places, shape = _places(k_N, width), (len(k_N), width)
    top_ids_NK = _padded(np.concatenate(ids), places, shape)
    top_ids_NK[k_N == 0, 0] = targets_N[k_N == 0]
    return TeacherTargets(
        top_ids=torch.from_numpy(top_ids_NK),
        top_logits=torch.from_numpy(_padded(np.concatenate(logits), places, shape)),
        k=torch.from_numpy(k_N),
        tail_logit=torch.from_numpy(np.concatenate(tails)),
        target_ids=torch.from_numpy(targets_N),
    )


def _entries_of(trace: Trace, valid: NDArray[np.int64]) -> slice | NDArray[np.bool_]:
    """Index of the entries of these tokens: a slice, unless others lie between them."""
    first, last = valid[0], valid[-1]
    offsets = trace.entry_offsets
    between = slice(int(offsets[first]), int(offsets[last + 1]))
    if between.stop - between.start == trace.k[valid].sum(dtype=np.int64):
        return between
    is_valid = np.zeros(len(trace.k), np.bool_)
    is_valid[valid] = True
    return np.repeat(is_valid, trace.k)


def _places(k_N: NDArray[np.int32], width: int) -> NDArray[np.int64]:
    """[E] index of each entry of ragged rows in the flat [N, width] that holds them."""
    row_starts = np.arange(len(k_N)) * width
    places = np.repeat(row_starts - entry_offsets(k_N)[:-1], k_N)
    places += np.arange(len(places))
    return places


def _padded(
    flat: NDArray[_Value], places: NDArray[np.int64], shape: tuple[int, int]
) -> NDArray[_Value]:
    """[N, K] with the values at their places and zeros elsewhere."""
    padded = np.zeros(shape, flat.dtype)
    padded.ravel()[places] = flat
    return padded
