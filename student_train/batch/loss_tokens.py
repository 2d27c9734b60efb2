"""Which tokens of a trace enter the loss, and what teaches each of them.

Letters: m tokens of a trace, n of them in the loss.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from student_train.batch.chunks import WholeChunks
from student_train.batch.vocabulary import within_vocabulary
from student_train.data.tokens import LossDropout, SelectedTrace, TokenSelection
from teacher_cache.format import Trace


@dataclass(frozen=True)
class Teaching:
    """What a run's objective learns from, besides distributions over tokens.

    Attributes:
        hard_labels: Whether there is a cross entropy: tokens of a response without a distribution
            enter the loss for it alone.
        chunks: Whether the likelihoods of chunks are matched instead of distributions.
    """

    hard_labels: bool = False
    chunks: bool = False


@dataclass(frozen=True)
class LossTokens:
    """A trace and its tokens that enter the loss."""

    trace: Trace
    source: int
    valid: NDArray[np.int64]  # [n] tokens
    chunks: WholeChunks | None
    num_absent: int
    num_hard_labels: int
    num_left_out: int

    @property
    def length(self) -> int:
        """Positions needed: up to the one that predicts the last loss token."""
        return int(self.valid[-1])

    @classmethod
    def of(
        cls,
        selected: SelectedTrace,
        teaching: Teaching,
        mask: LossDropout | None,
        num_ids: int | None,
    ) -> "LossTokens":
        """Choose the loss tokens of a trace; arguments are those of `micro_batches`."""
        trace, selection = selected.trace, selected.selection
        any_label = replace(teaching, hard_labels=teaching.hard_labels or teaching.chunks)
        valid, chunks = valid_positions(trace, selection, mask, any_label), None
        if teaching.chunks:
            chunks = WholeChunks.of(trace, valid)
            is_taught = chunks.of_token >= 0
            num_left_out = 0
            if not teaching.hard_labels:
                valid, chunks = valid[is_taught], chunks.within(is_taught)
                num_left_out = int((~is_taught).sum())
            num_hard_labels = int((~is_taught).sum()) - num_left_out
        else:
            num_left_out = 0
            if trace.student_logprob is not None:  # own tokens are no labels without a teacher
                is_taught = (trace.k[valid] > 0) | np.isnan(trace.student_logprob[valid])
                num_left_out = int((~is_taught).sum())
                valid = valid[is_taught]
            num_hard_labels = int((trace.k[valid] == 0).sum())
            if not teaching.hard_labels:
                lacking = _selected(trace, selection) & _without_distribution(trace)
                num_left_out = int(lacking.sum())
        fitted = trace if num_ids is None else within_vocabulary(trace, num_ids)
        num_absent = trace.k[valid].sum(dtype=np.int64) - fitted.k[valid].sum(dtype=np.int64)
        return cls(
            fitted, selected.source, valid, chunks, int(num_absent), num_hard_labels, num_left_out
        )


def valid_positions(
    trace: Trace,
    selection: TokenSelection,
    mask: LossDropout | None = None,
    teaching: Teaching = Teaching(),
) -> NDArray[np.int64]:
    """Tokens of a trace that enter the loss: selected, with something to teach them, not masked.

    That is a distribution, or in a response, with hard labels, the token itself.
    """
    has_label = _without_distribution(trace) if teaching.hard_labels else False
    valid = np.flatnonzero(_selected(trace, selection) & ((trace.k > 0) | has_label))
    return valid if mask is None else valid[mask.kept(trace.trace_id, len(valid))]


def _selected(trace: Trace, selection: TokenSelection) -> NDArray[np.bool_]:
    selected = np.zeros(len(trace.k), np.bool_)
    for first, end in selection.ranges(trace):
        selected[first:end] = True
    return selected


def _without_distribution(trace: Trace) -> NDArray[np.bool_]:
    """Tokens of the response whose distribution is missing; prompts often have none by choice."""
    without: NDArray[np.bool_] = trace.k == 0
    without[: trace.cot_start] = False
    return without
