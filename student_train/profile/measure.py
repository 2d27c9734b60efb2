"""One forward pass of the student over some traces, token by token.

Letters: N tokens of a trace that have a distribution, E kept entries of all of them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from student_train.batch.micro_batch import MicroBatch, micro_batches
from student_train.data.tokens import TokenSelection
from student_train.model.forward import StudentWithLoss
from student_train.model.load import output_layer
from teacher_cache.format import Trace

LARGEST_RANK = 100  # as in arXiv 2601.14249: larger ones count as this one


@dataclass(frozen=True, eq=False)
class TraceMeasures:
    """Figures of teacher and student for the tokens of one trace. In nats."""

    cache: int  # which of the profiled caches
    trace_id: str
    n_total: int
    token_N: NDArray[np.int64]  # its place in the trace
    section_N: NDArray[np.int64]  # index into SECTIONS
    divergence_N: NDArray[np.float64]  # the divergence between teacher and student
    nll_N: NDArray[np.float64]  # of the target token under the student
    rank_N: NDArray[np.int64]  # of the target token under the student, from 1
    entropy_N: NDArray[np.float64]  # of the teacher, its tail counted as one outcome
    tail_N: NDArray[np.float64]  # the teacher's mass outside the kept entries; NaN if unknown
    k_N: NDArray[np.int64]  # kept entries

    @property
    def is_response_N(self) -> NDArray[np.bool_]:
        """Whether a token belongs to the chain of thought or the answer."""
        return self.section_N > 0


def measured(
    student: StudentWithLoss,
    traces: Iterable[Trace],
    device: torch.device,
    cache: int,
    *,
    has_tails: bool = True,
) -> Iterator[TraceMeasures]:
    """Measure traces one by one; those without a distribution are left out.

    Args:
        student: Student in evaluation mode, on the device.
        traces: Traces, whole or as far as a truncated cache holds them.
        device: Device to compute on.
        cache: Index of the traces' cache among the profiled ones.
        has_tails: Whether that cache tells the mass outside the entries.
    """
    num_ids = output_layer(student.model).weight.shape[0]
    for trace in traces:
        batches = micro_batches(
            TokenSelection().selected([trace]),
            batch_tokens=1,
            loss_reduction="token",
            num_ids=num_ids,
        )
        if batches:
            found = _measures(student, trace, batches[0].to(device), cache)
            yield found if has_tails else replace(found, tail_N=np.full_like(found.tail_N, np.nan))


def _measures(
    student: StudentWithLoss, trace: Trace, batch: MicroBatch, cache: int
) -> TraceMeasures:
    result, rank = student.per_token_and_rank(batch, largest_rank=LARGEST_RANK)
    token_N = (batch.hidden_index + 1).cpu().numpy()
    return TraceMeasures(
        cache=cache,
        trace_id=trace.trace_id,
        n_total=trace.n_total,
        token_N=token_N,
        section_N=trace.section_of_token[token_N],
        divergence_N=result.kl.double().cpu().numpy(),
        nll_N=result.ce.double().cpu().numpy(),
        rank_N=rank.cpu().numpy(),
        entropy_N=trace.entropy[token_N],
        tail_N=trace.tail[token_N],
        k_N=trace.k[token_N].astype(np.int64),
    )
