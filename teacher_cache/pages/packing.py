"""A trace as bytes for a page: its columns one after the other, compressed, in base64.

Letters: m tokens, E kept entries of all of them.

Columns, little-endian, widest first so that each is aligned:

    float32 tail_logit [m]
    float32 kl [m], student_tail_logprob [m]      with a student
    index   token [m], entry [E]                  into the page's texts; uint16 where they fit, or
                                                  uint32
    uint16  student_logprob [E]                   with a student; -1/1000 nat, at most 65.535
    uint8   k [m], logit code [E]                 into the trace's own list of logits
"""

import base64
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format import Trace

_STEP_NATS = 0.001  # of the student's logprobs


@dataclass(frozen=True, eq=False)
class StudentView:
    """What a student says of a trace, token by token; NaN where the teacher has no distribution."""

    kl: NDArray[np.float64]  # [m] KL(teacher || student), nats
    tail_logprob: NDArray[np.float64]  # [m] of the ids outside the kept entries
    entry_logprobs: NDArray[np.float64]  # [E] of the teacher's kept entries


def texts_index(traces: Iterable[Trace]) -> NDArray[np.int64]:
    """Every token id that a page has to show, in rising order."""
    parts = [ids for trace in traces for ids in (trace.token_ids, trace.top_ids)]
    return np.unique(np.concatenate(parts)).astype(np.int64)


def pack(trace: Trace, known_ids: NDArray[np.int64], student: StudentView | None) -> str:
    """Columns of a trace.

    Args:
        trace: The trace.
        known_ids: Ids of the page's texts, in rising order.
        student: What a student says of it.

    Raises:
        ValueError: If its logits have more values than the format has codes.
    """
    index_type = "<u4" if len(known_ids) > 1 << 16 else "<u2"
    values, codes = np.unique(trace.top_logits, return_inverse=True)
    if len(values) > 256:
        raise ValueError(
            f"trace {trace.trace_id!r}: expected at most 256 different logits, as a cache holds "
            f"them, found {len(values):,}"
        )
    columns: list[NDArray[Any]] = [trace.tail_logit.astype("<f4")]
    if student is not None:
        columns += [student.kl.astype("<f4"), student.tail_logprob.astype("<f4")]
    for ids in (trace.token_ids, trace.top_ids):
        columns.append(np.searchsorted(known_ids, ids).astype(index_type))
    if student is not None:
        steps = np.round(-student.entry_logprobs / _STEP_NATS)
        columns.append(np.clip(steps, 0, (1 << 16) - 1).astype("<u2"))
    columns += [trace.k.astype("u1"), codes.astype("u1")]
    packed = zlib.compress(b"".join(column.tobytes() for column in columns), 9)
    return base64.b64encode(packed).decode("ascii")


def facts(trace: Trace, student: StudentView | None) -> dict[str, Any]:
    """What a page says of a trace besides its columns."""
    return {
        "id": trace.trace_id,
        "num_tokens": len(trace),
        "num_entries": trace.num_entries,
        "n_total": trace.n_total,
        "cot_start": trace.cot_start,
        "answer_start": trace.answer_start,
        "finish_reason": trace.finish_reason,
        "fields": dict(trace.fields),
        "logits": np.unique(trace.top_logits).tolist(),
        "has_student": student is not None,
    }
