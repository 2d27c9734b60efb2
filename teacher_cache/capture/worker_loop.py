"""One worker's loop: requests -> teacher -> journal, whatever the source of requests."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teacher_cache.capture.noise import Repeats
from teacher_cache.engines import EngineError, Teacher, TeacherRequest, TeacherRows
from teacher_cache.engines.checks import looks_rounded
from teacher_cache.format import (
    CacheHeader,
    CacheWriter,
    FinishedTrace,
    KeepPolicy,
    Trace,
    keep_entries,
)
from teacher_cache.sources import SourceTrace, find_sections
from teacher_cache.sources.tokenizer import TeacherTokenizer

Work = tuple[SourceTrace, TeacherRequest]
_NUM_LOOKED_AT = 8  # first traces of every run, whose logits are checked


@dataclass(frozen=True)
class Done:
    """A trace stored in the journal."""

    request_id: str
    num_tokens: int
    cut_by_length: bool
    has_thought: bool
    is_empty: bool = False  # none of its tokens has a distribution


def run_requests(
    work: Iterator[Work],
    teacher: Teacher,
    writer: CacheWriter,
    tokenizer: TeacherTokenizer,
    note: Callable[[Done], None],
    hold: Callable[[], AbstractContextManager[object]],
    repeats: Repeats,
) -> None:
    """Run every request that is missing from the cache.

    Args:
        work: Requests; after its end it is asked again as long as traces are in flight.
        teacher: Runs the requests.
        writer: Keeps each trace as it finishes.
        tokenizer: The teacher's tokenizer.
        note: Called for every trace, once it is kept.
        hold: Protects keeping and noting a trace from interruption.
        repeats: Remembers the first traces, for the noise floor.

    Raises:
        EngineError: From the teacher; finished traces are kept.
        OSError: If a trace cannot be written; finished traces are kept.
    """
    in_flight: dict[str, SourceTrace] = {}

    def begin(item: Work) -> TeacherRequest:
        source, request = item
        in_flight[request.request_id] = source
        return request

    # Not a generator, which cannot resume after its end.
    missing = filter(lambda item: item[1].request_id not in writer.finished(), work)
    for number, rows in enumerate(teacher.run(map(begin, missing))):
        if number < _NUM_LOOKED_AT:
            _check_head(rows, writer.header)
        repeats.keep(rows)
        with hold():
            source = in_flight.pop(rows.request_id)
            finished = finished_trace(rows, source, writer.header, tokenizer)
            writer.append(finished)
            trace = finished.trace
            note(
                Done(
                    rows.request_id,
                    len(rows.token_ids),
                    cut_by_length=trace.finish_reason == "length",
                    has_thought=trace.cot_start < trace.answer_start,
                    is_empty=not trace.k.any(),
                )
            )


def _check_head(rows: TeacherRows, header: CacheHeader) -> None:
    """Refuse rounded logits that the engine reports as float32."""
    if header.head_dtype == "float32" and looks_rounded(rows.row_logprobs[:, 1:]):
        raise EngineError(
            f"request {rows.request_id!r}: the engine reports a float32 head, but its logits are "
            "rounded as bfloat16's are. Capture with what it really computes, so that the cache "
            'says so: --engine-arg \'hf_overrides={"head_dtype": "bfloat16"}\', or use another '
            "version of the engine"
        )


def finished_trace(
    rows: TeacherRows, source: SourceTrace, header: CacheHeader, tokenizer: TeacherTokenizer
) -> FinishedTrace:
    """Turn a teacher's rows into a trace: find sections, choose entries, count both.

    Of a given trace the rows may be those of its lead span alone.
    """
    bounds = source.bounds or find_sections(
        rows.token_ids.tolist(), source.num_prompt, source.opened_at, source.marks, tokenizer
    )
    n_total = max(len(rows.token_ids), len(source.token_ids))
    ids = rows.token_ids[: header.num_held(n_total)]
    # When scoring, rows of prompt tokens may arrive even if they were not requested.
    first = rows.first_row if header.capture_prompt else max(rows.first_row, source.num_prompt)
    policy = KeepPolicy(header.top_k, header.mass)
    has_row = np.ones(len(ids), bool)
    has_row[:first] = False
    for start, end in source.without_rows:
        has_row[start:end] = False
    given = has_row[rows.first_row :]
    which = slice(None) if given.all() else given  # a mask would copy all rows
    row_ids = rows.row_ids[: len(given)][which]
    row_logprobs = rows.row_logprobs[: len(given)][which]
    tails = None if rows.row_tails is None else rows.row_tails[: len(given)][which]
    kept = keep_entries(row_ids, row_logprobs, policy, tails)
    k, tail_logit = np.zeros(len(ids), np.uint8), np.zeros(len(ids), np.float32)
    k[has_row], tail_logit[has_row] = kept.k, kept.tail_logit
    trace = Trace(
        trace_id=rows.request_id,
        token_ids=ids,
        n_total=n_total,
        cot_start=bounds[0],
        answer_start=bounds[1],
        k=k,
        top_ids=kept.top_ids,
        top_logits=kept.top_logits,
        tail_logit=tail_logit,
        finish_reason=source.finish_reason or rows.finish_reason,
        fields=source.fields,
        student_logprob=_student_logprob(source, len(ids)),
    )
    return FinishedTrace(
        trace,
        source.source_hash,
        kept.num_clamped_tails,
        kept.num_clamped_logits,
        messages=source.messages,
    )


def _student_logprob(source: SourceTrace, num_tokens: int) -> NDArray[np.float32] | None:
    if source.student_logprobs is None:
        return None
    column = np.full(num_tokens, np.nan, np.float32)
    num_held = max(0, num_tokens - source.num_prompt)  # of a lead span
    column[source.num_prompt :] = source.student_logprobs[:num_held]
    return column
