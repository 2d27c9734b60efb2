"""Traces -> micro-batches with the teacher's targets: where numpy becomes torch.

Letters: B rows, T positions, N loss tokens of a micro-batch, K kept entries of the widest,
S traces.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from student_train.batch.dense_targets import targets_of
from student_train.batch.loss_tokens import LossTokens, Teaching
from student_train.batch.packing import plan_micro_batches
from student_train.data.tokens import LossDropout, SelectedTrace
from student_train.losses import ChunkTargets, TeacherTargets

DISTRIBUTIONS = Teaching()  # and nothing else


@dataclass(frozen=True)
class RowLengths:
    """Tokens of each trace of a row; torch.compile would make new code for every plain tuple."""

    lengths: tuple[int, ...]


@dataclass(frozen=True)
class MicroBatch:
    """Input of one forward pass.

    Integers are int32 on the CPU, half of what would travel to a device; there indices are int64.
    """

    input_ids: Tensor  # [B, T] integer, padded on the right with 0
    # [B, T] integer, from 0 in every trace; None where each row is one trace. Padding continues
    # the row's last trace: no token looks ahead, so no mask is needed for it.
    position_ids: Tensor | None
    # [S + 1] int32, start of each trace and end of the last; only in the layout "flat".
    trace_ends: Tensor | None
    # Tokens of each trace of the one row of which this is a part, the row's padding in the last;
    # None where the rows are whole, or of one trace each.
    lengths_in_row: RowLengths | None
    row_lengths: Tensor  # [B] int32, tokens of each row; the rest is padding
    longest: int  # tokens of the longest trace
    hidden_index: Tensor  # [N] integer, flat index into B x T of the position that predicts a token
    targets: TeacherTargets  # N rows
    token_weight: Tensor  # [N] float32, not yet divided by the step's normaliser
    source: Tensor  # [N] integer, the token's cache, where a run has several
    # [N] float32, of the student that sampled the token, nats; NaN for tokens of other origin.
    rollout_logprob: Tensor
    num_positions: tuple[int, ...]  # of each trace that has a loss token
    num_absent: int  # kept entries whose id the student lacks; they are in the tail
    chunks: ChunkTargets | None  # None where distributions teach
    num_distributions: int  # loss tokens that have one, of N
    num_hard_labels: int  # loss tokens that their label alone teaches, of N
    num_left_out: int  # selected tokens that nothing teaches, and so not in the loss

    @property
    def num_traces(self) -> int:
        """Number of traces with a loss token."""
        return len(self.num_positions)

    @property
    def num_valid(self) -> int:
        """Number of loss tokens N."""
        return len(self.hidden_index)

    def predicting_positions(self) -> Tensor:
        """[N] position, within its trace, that predicts each loss token; on the CPU."""
        index = self.hidden_index.long()
        if self.position_ids is None:
            return index % self.input_ids.shape[1]
        return self.position_ids.flatten()[index]

    def to(self, device: torch.device) -> "MicroBatch":
        """Copy of the micro-batch on another device.

        From pinned memory the copies wait in the device's current stream, and the caller does not
        wait for them. The memory may be dropped at once: torch gives it to nobody else before.
        """
        there = self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))
        positions = there.position_ids
        return replace(
            there,
            input_ids=there.input_ids.long(),
            position_ids=None if positions is None else positions.long(),
            hidden_index=there.hidden_index.long(),
            source=there.source.long(),
        )

    def pinned(self) -> "MicroBatch":
        """Copy in memory that the current GPU reads by itself."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, changed: Callable[[Tensor], Tensor]) -> "MicroBatch":
        found: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                found[item.name] = changed(value)
            elif isinstance(value, TeacherTargets | ChunkTargets):
                parts = {part.name: changed(getattr(value, part.name)) for part in fields(value)}
                found[item.name] = type(value)(**parts)
        return replace(self, **found)


def micro_batches(
    traces: Sequence[SelectedTrace],
    *,
    batch_tokens: int,
    loss_reduction: str,
    mask: LossDropout | None = None,
    layout: str = "alone",
    num_ids: int | None = None,
    teaching: Teaching = DISTRIBUTIONS,
) -> list[MicroBatch]:
    """Cut a rank's part of a global batch into micro-batches, the longest traces first.

    Traces without a loss token are left out: they have nothing to learn from.

    Args:
        traces: Traces, and which of their tokens enter the loss.
        batch_tokens: Cap of B x T; a trace longer than that is alone in its micro-batch.
        loss_reduction: "token" (all tokens weigh the same) or "sequence" (all traces do).
        mask: Dropout that leaves some of the selected tokens out of the loss.
        layout: How traces share rows; see `packing.LAYOUTS`.
        num_ids: Number of the student's ids, if it may have fewer than the teacher.
        teaching: What the objective learns from.

    Returns:
        Micro-batches whose loss, summed and divided by `normaliser`, is the batch's loss.

    Raises:
        CacheMismatchError: If a trace holds a token that the student lacks.
    """
    parts = [LossTokens.of(trace, teaching, mask, num_ids) for trace in traces]
    parts = [part for part in parts if len(part.valid)]
    plan = plan_micro_batches([part.length for part in parts], batch_tokens, layout)
    return [
        _collate(
            [[parts[index] for index in row] for row in rows],
            per_trace=loss_reduction == "sequence",
            is_flat=layout == "flat",
        )
        for rows in plan
    ]


def one_micro_batch(
    traces: Sequence[SelectedTrace],
    *,
    num_ids: int | None = None,
    teaching: Teaching = DISTRIBUTIONS,
) -> MicroBatch:
    """Put all traces in one micro-batch, one per row whatever their length; every token weighs 1.

    `num_ids` and `teaching` are as in `micro_batches`.
    """
    parts = [LossTokens.of(trace, teaching, None, num_ids) for trace in traces]
    rows = [[part] for part in parts if len(part.valid)]
    rows.sort(key=lambda row: -row[0].length)
    return _collate(rows, per_trace=False, is_flat=False) if rows else empty_micro_batch()


def normaliser(num_valid: int, num_traces: int, loss_reduction: str) -> int:
    """Divisor of a step's summed loss: its loss tokens, or its traces that have any."""
    return num_traces if loss_reduction == "sequence" else num_valid


def empty_micro_batch() -> MicroBatch:
    """One position and no loss token: keeps a rank without traces in step with the others."""
    nothing = torch.zeros(0, dtype=torch.int32)
    targets = TeacherTargets(
        top_ids=nothing[:, None].expand(0, 1),
        top_logits=torch.zeros(0, 1),
        k=nothing,
        tail_logit=torch.zeros(0),
        target_ids=nothing,
    )
    return MicroBatch(
        input_ids=torch.zeros(1, 1, dtype=torch.int32),
        position_ids=None,
        trace_ends=None,
        lengths_in_row=None,
        row_lengths=torch.zeros(1, dtype=torch.int32),
        longest=1,
        hidden_index=nothing,
        targets=targets,
        token_weight=torch.zeros(0),
        source=nothing,
        rollout_logprob=torch.zeros(0),
        num_positions=(),
        num_absent=0,
        chunks=None,
        num_distributions=0,
        num_hard_labels=0,
        num_left_out=0,
    )


def _collate(rows: Sequence[Sequence[LossTokens]], *, per_trace: bool, is_flat: bool) -> MicroBatch:
    row_lengths = np.array([sum(part.length for part in row) for row in rows], np.int32)
    width = int(row_lengths.max())
    input_ids_BT = np.zeros((len(rows), width), np.int32)
    position_ids_BT = np.zeros((len(rows), width), np.int32)
    hidden_index, weights, sources, rollout_logprobs = [], [], [], []
    for number, row in enumerate(rows):
        begin = 0
        for part in row:
            end = begin + part.length
            input_ids_BT[number, begin:end] = part.trace.token_ids[: part.length]
            position_ids_BT[number, begin:] = np.arange(width - begin)
            # Entry t is predicted at t - 1.
            hidden_index.append((number * width + begin + part.valid - 1).astype(np.int32))
            weights.append(np.full(len(part.valid), _weight(part, per_trace), np.float32))
            sources.append(np.full(len(part.valid), part.source, np.int32))
            rollout_logprobs.append(_rollout_logprob(part))
            begin = end
    parts = [part for row in rows for part in row]
    trace_ends = np.cumsum([0, *(part.length for part in parts)], dtype=np.int32)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids_BT),
        position_ids=torch.from_numpy(position_ids_BT) if len(parts) > len(rows) else None,
        trace_ends=torch.from_numpy(trace_ends) if is_flat else None,
        lengths_in_row=None,
        row_lengths=torch.from_numpy(row_lengths),
        longest=max(part.length for part in parts),
        hidden_index=torch.from_numpy(np.concatenate(hidden_index)),
        targets=targets_of([(part.trace, part.valid) for part in parts]),
        token_weight=torch.from_numpy(np.concatenate(weights)),
        source=torch.from_numpy(np.concatenate(sources)),
        rollout_logprob=torch.from_numpy(np.concatenate(rollout_logprobs)),
        num_positions=tuple(part.length for part in parts),
        num_absent=sum(part.num_absent for part in parts),
        chunks=_chunk_targets(parts, per_trace=per_trace),
        num_distributions=sum(int((part.trace.k[part.valid] > 0).sum()) for part in parts),
        num_hard_labels=sum(part.num_hard_labels for part in parts),
        num_left_out=sum(part.num_left_out for part in parts),
    )


def _rollout_logprob(part: LossTokens) -> NDArray[np.float32]:
    column = part.trace.student_logprob
    return np.full(len(part.valid), np.nan, np.float32) if column is None else column[part.valid]


def _weight(part: LossTokens, per_trace: bool) -> float:
    return 1 / len(part.valid) if per_trace else 1.0


def _chunk_targets(parts: Sequence[LossTokens], *, per_trace: bool) -> ChunkTargets | None:
    """The chunks of all traces; None where distributions teach. A chunk weighs like a token."""
    num_chunks = sum(len(part.chunks.logprob) for part in parts if part.chunks is not None)
    chunk_of, logprobs, weights = [], [], []
    first = 0
    for part in parts:
        if part.chunks is None:
            return None
        own = part.chunks.of_token
        chunk_of.append(np.where(own < 0, num_chunks, own + first).astype(np.int32))
        logprobs.append(part.chunks.logprob)
        size = len(part.chunks.logprob)
        weights.append(np.full(size, _weight(part, per_trace), np.float32))
        first += size
    return ChunkTargets(
        *(torch.from_numpy(np.concatenate(values)) for values in (chunk_of, logprobs, weights))
    )
