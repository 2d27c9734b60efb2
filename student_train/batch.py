"""Traces -> padded micro-batches with the teacher's targets: where numpy becomes torch.

Letters: B traces, T positions, N valid tokens of a micro-batch, K kept entries of the widest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from student_train.losses import TeacherTargets
from student_train.selection import RandomMask, TokenSelection
from teacher_cache.format import Trace

_Value = TypeVar("_Value", bound=np.generic)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes."""

    input_ids: Tensor  # [B, T] int64, padded on the right with 0
    attention_mask: Tensor  # [B, T] int64, 1 where there is a token
    hidden_index: Tensor  # [N] int64, flat index into B x T of the position that predicts a token
    targets: TeacherTargets  # N rows
    token_weight: Tensor  # [N] float32, not yet divided by the step's normaliser
    num_traces: int  # with a valid token

    @property
    def num_valid(self) -> int:
        """N."""
        return len(self.hidden_index)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device."""
        targets = {
            item.name: getattr(self.targets, item.name).to(device)
            for item in fields(TeacherTargets)
        }
        return MicroBatch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.hidden_index.to(device),
            TeacherTargets(**targets),
            self.token_weight.to(device),
            self.num_traces,
        )


def valid_positions(
    trace: Trace, selection: TokenSelection, mask: RandomMask | None = None
) -> NDArray[np.int64]:
    """Tokens of a trace that enter the loss: selected, with a distribution, not masked."""
    selected = np.zeros(len(trace.k), np.bool_)
    for first, end in selection.ranges(trace.n_total, trace.cot_start, trace.answer_start):
        selected[first:end] = True
    valid = np.flatnonzero(selected & (trace.k > 0))
    return valid if mask is None else valid[mask.kept(trace.trace_id, len(valid))]


def micro_batches(
    traces: Sequence[Trace],
    selection: TokenSelection,
    *,
    batch_tokens: int,
    normalise: str,
    mask: RandomMask | None = None,
) -> list[MicroBatch]:
    """Cut a rank's part of a global batch into micro-batches, the longest traces first.

    Traces without a valid token are left out: they have nothing to learn from.

    Args:
        traces: Holding at least the selected tokens.
        selection: Which tokens enter the loss.
        batch_tokens: Cap of B x T; a trace longer than that is alone in its micro-batch.
        normalise: "tokens" (every valid token weighs the same) or "traces" (every trace does).
        mask: Leaves some of the selected tokens out of the loss.

    Returns:
        Micro-batches whose loss, summed and divided by `normaliser`, is the batch's loss.
    """
    pairs = [(trace, valid_positions(trace, selection, mask)) for trace in traces]
    # What predicts the last valid token is the last position needed.
    pairs = sorted((pair for pair in pairs if len(pair[1])), key=lambda pair: -int(pair[1][-1]))
    groups: list[list[tuple[Trace, NDArray[np.int64]]]] = []
    for pair in pairs:
        longest = int(groups[-1][0][1][-1]) if groups else 0
        if groups and longest * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(pair)
        else:
            groups.append([pair])
    return [_collate(group, per_trace=normalise == "traces") for group in groups]


def normaliser(num_valid: int, num_traces: int, normalise: str) -> int:
    """What a step's summed loss is divided by: its valid tokens, or its traces that have any."""
    return num_traces if normalise == "traces" else num_valid


def empty_micro_batch() -> MicroBatch:
    """One position and no valid token: keeps a rank without traces in step with the others."""
    nothing = torch.zeros(0, dtype=torch.int64)
    targets = TeacherTargets(
        top_ids=nothing[:, None].expand(0, 1),
        top_logits=torch.zeros(0, 1),
        k=nothing,
        tail_logit=torch.zeros(0),
        realised_ids=nothing,
    )
    one = torch.ones(1, 1, dtype=torch.int64)
    return MicroBatch(torch.zeros_like(one), one, nothing, targets, torch.zeros(0), 0)


def _collate(pairs: Sequence[tuple[Trace, NDArray[np.int64]]], *, per_trace: bool) -> MicroBatch:
    num_positions = int(pairs[0][1][-1])  # the first is the longest
    input_ids_BT = np.zeros((len(pairs), num_positions), np.int64)
    attention_mask_BT = np.zeros((len(pairs), num_positions), np.int64)
    hidden_index, weights, k, tails, realised, ids, logits = [], [], [], [], [], [], []
    for row, (trace, valid) in enumerate(pairs):
        length = int(valid[-1])
        input_ids_BT[row, :length] = trace.token_ids[:length]
        attention_mask_BT[row, :length] = 1
        hidden_index.append(row * num_positions + valid - 1)  # entry t is predicted at t - 1
        weights.append(np.full(len(valid), 1 / len(valid) if per_trace else 1.0, np.float32))
        k.append(trace.k[valid])
        tails.append(trace.tail_logit[valid])
        realised.append(trace.token_ids[valid])
        entries = _entries_of(trace, valid)
        ids.append(trace.top_ids[entries])
        logits.append(trace.top_logits[entries])
    k_N = np.concatenate(k).astype(np.int64)
    places, shape = _places(k_N), (len(k_N), int(k_N.max()))
    targets = TeacherTargets(
        top_ids=torch.from_numpy(_padded(np.concatenate(ids), places, shape)),
        top_logits=torch.from_numpy(_padded(np.concatenate(logits), places, shape)),
        k=torch.from_numpy(k_N),
        tail_logit=torch.from_numpy(np.concatenate(tails)),
        realised_ids=torch.from_numpy(np.concatenate(realised).astype(np.int64)),
    )
    return MicroBatch(
        torch.from_numpy(input_ids_BT),
        torch.from_numpy(attention_mask_BT),
        torch.from_numpy(np.concatenate(hidden_index)),
        targets,
        torch.from_numpy(np.concatenate(weights)),
        len(pairs),
    )


def _entries_of(trace: Trace, valid: NDArray[np.int64]) -> slice | NDArray[np.bool_]:
    """Where the entries of these tokens stand: a slice, unless others lie between them."""
    first, last = valid[0], valid[-1]
    ends = np.cumsum(trace.k, dtype=np.int64)
    between = slice(int(ends[first]) - int(trace.k[first]), int(ends[last]))
    if between.stop - between.start == trace.k[valid].sum(dtype=np.int64):
        return between
    is_valid = np.zeros(len(trace.k), np.bool_)
    is_valid[valid] = True
    return np.repeat(is_valid, trace.k)


def _places(k_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """[E] where each entry of ragged rows stands in the flat [N, K] that holds them."""
    row_starts = np.arange(len(k_N)) * k_N.max()
    places = np.repeat(row_starts - (np.cumsum(k_N) - k_N), k_N)
    places += np.arange(len(places))
    return places


def _padded(
    flat: NDArray[_Value], places: NDArray[np.int64], shape: tuple[int, int]
) -> NDArray[_Value]:
    """[N, K] with the values at their places and zeros elsewhere."""
    padded = np.zeros(shape, flat.dtype)
    padded.ravel()[places] = flat
    return padded
