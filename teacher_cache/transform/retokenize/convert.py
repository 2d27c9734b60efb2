"""Converter: turns a cache's traces into a student's, in batches. One per process."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format import (
    CacheHeader,
    FinishedTrace,
    KeepPolicy,
    Trace,
    content_hash,
)
from teacher_cache.sources import BadRow, PromptRenderer, Reason, SourceTrace, find_sections
from teacher_cache.sources.tokenizer import TeacherTokenizer
from teacher_cache.transform.retokenize.alignment import Response, align
from teacher_cache.transform.retokenize.byte_tokenizer import ByteTokenizer
from teacher_cache.transform.retokenize.certificate import FIELD, Certificate, certify
from teacher_cache.transform.retokenize.chunks import chunk_logprobs, of_prompt
from teacher_cache.transform.retokenize.distribution import Derivation
from teacher_cache.transform.retokenize.joints import Joints
from teacher_cache.transform.retokenize.response import ResponseWriter
from teacher_cache.transform.retokenize.rows import MAX_CONTRIBUTIONS, MAX_ROWS, Rows, keep
from teacher_cache.transform.retokenize.vocabularies import Vocabularies


@dataclass(frozen=True)
class Task:
    """A teacher's trace and the row it was made from; None if that is unknown."""

    trace: Trace
    source_hash: str
    row: dict[str, Any] | None


@dataclass(frozen=True)
class Rejected:
    """A trace that cannot be carried over."""

    trace_id: str
    error: BadRow


class Converter:
    """Converts traces of one teacher for one student."""

    def __init__(
        self,
        source: CacheHeader,
        teacher: ByteTokenizer,
        student: ByteTokenizer,
        words: Vocabularies,
        chat: TeacherTokenizer,
        render: PromptRenderer,
    ) -> None:
        """Read both vocabularies, which takes some seconds.

        Args:
            source: Header of the teacher's cache.
            teacher: The teacher's tokenizer.
            student: The student's tokenizer.
            words: Both vocabularies in one language.
            chat: The student's tokenizer with its chat template.
            render: Renders rows as the student's prompts.
        """
        joints = Joints(student, teacher, words.texts)
        self._derive = Derivation(joints, words.texts, words.student)
        self._write = ResponseWriter(source, student, words)
        self._policy = KeepPolicy(source.top_k, source.mass)
        self._words, self._chat, self._render = words, chat, render

    def __call__(self, tasks: Sequence[Task]) -> list[FinishedTrace | Rejected]:
        """Convert some traces; each becomes a student's trace, or is rejected with a reason."""
        results: list[FinishedTrace | Rejected] = []
        usable: list[tuple[Task, SourceTrace, Response]] = []
        for task in tasks:
            try:
                usable.append(self._prepared(task))
            except BadRow as error:
                results.append(Rejected(task.trace.trace_id, error))
        if not usable:
            return results
        responses = [response for _, _, response in usable]
        batch = align(responses, self._derive.teacher_lengths)
        found = self._derive(batch)
        rows = keep(found, batch.student_ids, self._policy)
        certificates = certify(batch, found, rows.realised, len(responses))
        chunks = chunk_logprobs(batch)
        for number, (task, prompt, response) in enumerate(usable):
            tokens = np.flatnonzero(batch.student_response == number)
            own = slice(int(tokens[0]), int(tokens[-1]) + 1)
            part = _part(rows, own)
            results.append(
                self._finished(task, prompt, response, part, chunks[own], certificates[number])
            )
        return results

    def _prepared(self, task: Task) -> tuple[Task, SourceTrace, Response]:
        trace = task.trace
        if task.row is None:
            raise BadRow(
                Reason.NO_ROW, "its prompt's messages are unknown; give the rows with --rows, by id"
            )
        if FIELD in trace.fields:
            raise BadRow(
                Reason.FIELD_RESERVED, f"it already has a field {FIELD!r}: it is itself derived"
            )
        if 2 * trace.num_entries > MAX_CONTRIBUTIONS or trace.n_total * 4 > MAX_ROWS:
            raise BadRow(Reason.TRACE_TOO_LONG, f"{trace.num_entries} entries in one trace")
        prompt = self._render(task.row)
        return task, prompt, self._write(trace, prompt)

    def _finished(
        self,
        task: Task,
        prompt: SourceTrace,
        response: Response,
        rows: Rows,
        chunks: NDArray[np.float32],
        certificate: Certificate,
    ) -> FinishedTrace:
        source = task.trace
        num_prompt = len(prompt.token_ids)
        ids = np.concatenate([np.array(prompt.token_ids, np.int32), response.student_ids])
        n_total = self._whole_length(source, len(ids))
        cot_start, answer_start = self._sections(source, prompt, ids, n_total)
        trace = Trace(
            trace_id=source.trace_id,
            token_ids=ids,
            n_total=n_total,
            cot_start=cot_start,
            answer_start=answer_start,
            k=np.concatenate([np.zeros(num_prompt, np.uint8), rows.k]),
            top_ids=rows.top_ids,
            top_logits=rows.top_logits,
            tail_logit=np.concatenate([np.zeros(num_prompt, np.float32), rows.tail_logit]),
            chunk_logprob=np.concatenate([of_prompt(num_prompt), chunks]),
            finish_reason=source.finish_reason,
            fields={**source.fields, FIELD: certificate.to_json()},
        )
        return FinishedTrace(
            trace,
            content_hash([task.source_hash, list(prompt.token_ids)]),
            num_clamped_tails=int(rows.is_clamped_tail.sum()),
            num_clamped_logits=int(rows.num_clamped_logits.sum()),
            messages=prompt.messages,
        )

    def _whole_length(self, source: Trace, num_tokens: int) -> int:
        """Number of tokens of the whole trace; for a truncated one, scaled in proportion."""
        if len(source.token_ids) == source.n_total:
            return num_tokens
        header = self._write.header
        guess = int(num_tokens / header.max_lead_span)
        return next(n for n in range(guess, guess + 4) if header.num_held(n) == num_tokens)

    def _sections(
        self, source: Trace, prompt: SourceTrace, ids: NDArray[np.int32], n_total: int
    ) -> tuple[int, int]:
        num_prompt = len(prompt.token_ids)
        if source.cot_start == source.answer_start:
            return num_prompt, num_prompt
        marks = self._words.marks
        cot_start, answer_start = find_sections(
            ids.tolist(), num_prompt, prompt.opened_at, marks, self._chat
        )
        if answer_start == len(ids) and source.answer_start > len(source.token_ids):
            share = source.answer_start / source.n_total  # beyond what a truncated cache holds
            answer_start = min(n_total, max(len(ids), round(share * n_total)))
        return cot_start, answer_start


def _part(rows: Rows, tokens: slice) -> Rows:
    ends = np.concatenate([[0], np.cumsum(rows.k, dtype=np.int64)])
    entries = slice(int(ends[tokens.start]), int(ends[tokens.stop]))
    return replace(
        rows,
        k=rows.k[tokens],
        top_ids=rows.top_ids[entries],
        top_logits=rows.top_logits[entries],
        tail_logit=rows.tail_logit[tokens],
        realised=rows.realised[tokens],
        is_clamped_tail=rows.is_clamped_tail[tokens],
        num_clamped_logits=rows.num_clamped_logits[tokens],
    )
