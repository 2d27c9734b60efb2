"""Positions of the teacher's and the student's tokens in the text that both write.

Letters: N tokens of the teacher, M of the student, E kept entries, in all responses of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format import Trace, stored_logprobs


@dataclass(frozen=True)
class Response:
    """The assistant's text in the tokens of both; their bytes are the same.

    The student's may begin later (after a mark of its template) and end earlier (a text that
    was cut).
    """

    trace: Trace  # the teacher's
    first_token: int  # of the response, in the trace
    num_teacher: int  # tokens from there on
    student_ids: NDArray[np.int32]
    student_lengths: NDArray[np.int64]  # bytes of each
    skipped_bytes: int  # bytes of the response before the student's first token


@dataclass(frozen=True)
class Batch:
    """Concatenated responses, with the teacher's distributions as probabilities."""

    teacher_ids: NDArray[np.int64]  # [N]
    teacher_starts: NDArray[np.int64]  # [N] first byte of each
    teacher_response: NDArray[np.int64]  # [N] index of its response
    k: NDArray[np.int64]  # [N]
    first_entry: NDArray[np.int64]  # [N]
    tail: NDArray[np.float64]  # [N] mass outside the kept entries; 0 if there are none
    realised: NDArray[np.float64]  # [N] probability of the target token; 1 if it has none
    entry_ids: NDArray[np.int64]  # [E]
    entry_probs: NDArray[np.float64]  # [E]
    student_ids: NDArray[np.int64]  # [M]
    student_starts: NDArray[np.int64]  # [M]
    student_lengths: NDArray[np.int64]  # [M]
    student_response: NDArray[np.int64]  # [M]
    level: NDArray[np.int64]  # [M] the teacher's token in which each begins
    depth: NDArray[np.int64]  # [M] bytes of that token before it
    last: NDArray[np.int64]  # [M] the teacher's token that contains its last byte
    ends_on: NDArray[np.bool_]  # [M] whether it ends together with that token

    @cached_property
    def _log_sums(self) -> NDArray[np.int64]:
        """[N + 1] sums of the target tokens' logprobs before each token."""
        return np.concatenate([[0], exact_cumsum(np.log(self.realised))])

    def log_realised(
        self, first: NDArray[np.int64], behind: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Logprob of the text of some of the teacher's tokens, whatever else is in the batch.

        Args:
            first: [R] first token of each stretch.
            behind: [R] the token behind it.
        """
        return (self._log_sums[behind] - self._log_sums[first]) / FIXED_POINT


def align(responses: Sequence[Response], lengths: NDArray[np.int64]) -> Batch:
    """Concatenate responses.

    Args:
        responses: One or more responses.
        lengths: Bytes of each of the teacher's ids, at least one for ids in the responses.
    """
    parts = [_teacher_part(response) for response in responses]
    teacher_ids, k, tail, entry_ids, entry_probs = (
        np.concatenate(columns) for columns in zip(*parts, strict=True)
    )
    counts = [response.num_teacher for response in responses]
    teacher_response = np.repeat(np.arange(len(responses)), counts)
    token_lengths = lengths[teacher_ids]
    teacher_ends = np.cumsum(token_lengths)
    teacher_starts = teacher_ends - token_lengths
    first_token = np.cumsum(counts) - counts
    token_of_entry = np.repeat(np.arange(len(k)), k)
    realised = np.ones(len(k))
    own = np.flatnonzero(entry_ids == teacher_ids[token_of_entry])
    realised[token_of_entry[own]] = entry_probs[own]

    sizes = [len(response.student_ids) for response in responses]
    student_response = np.repeat(np.arange(len(responses)), sizes)
    student_lengths = np.concatenate([response.student_lengths for response in responses])
    behind = np.cumsum(student_lengths) - student_lengths
    begin = teacher_starts[first_token] + [response.skipped_bytes for response in responses]
    begin -= np.concatenate([behind, [0]])[np.cumsum(sizes) - sizes]
    student_starts = behind + begin[student_response]
    student_ends = student_starts + student_lengths
    level = np.searchsorted(teacher_starts, student_starts, side="right") - 1
    last = np.searchsorted(teacher_ends, student_ends, side="left")
    return Batch(
        teacher_ids=teacher_ids,
        teacher_starts=teacher_starts,
        teacher_response=teacher_response,
        k=k,
        first_entry=np.cumsum(k) - k,
        tail=tail,
        realised=realised,
        entry_ids=entry_ids,
        entry_probs=entry_probs,
        student_ids=np.concatenate([response.student_ids for response in responses]).astype("i8"),
        student_starts=student_starts,
        student_lengths=student_lengths,
        student_response=student_response,
        level=level,
        depth=student_starts - teacher_starts[level],
        last=last,
        ends_on=teacher_ends[last] == student_ends,
    )


def _teacher_part(response: Response) -> tuple[NDArray[np.generic], ...]:
    trace = response.trace
    tokens = slice(response.first_token, response.first_token + response.num_teacher)
    ends = np.cumsum(trace.k, dtype=np.int64)
    first = int(ends[tokens.start - 1]) if tokens.start else 0
    entries = slice(first, int(ends[tokens.stop - 1]) if tokens.stop else 0)
    k, tail_logit = trace.k[tokens], trace.tail_logit[tokens]
    logprobs = stored_logprobs(k, trace.top_logits[entries], tail_logit)
    tail = np.exp(-np.logaddexp(0.0, -tail_logit.astype(np.float64)))
    return (
        trace.token_ids[tokens].astype(np.int64),
        k.astype(np.int64),
        np.where(k > 0, tail, 0.0),
        trace.top_ids[entries].astype(np.int64),
        np.exp(logprobs),
    )


FIXED_POINT = float(1 << 36)  # of running sums: 1.5e-11, and room for 2^27


def exact_cumsum(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """[R] running sums, in units of 1 / FIXED_POINT.

    Differences of rounded sums would depend on what stands before, and so on which traces are
    converted together: a job that was stopped would end with other bytes.
    """
    return np.cumsum(np.rint(values * FIXED_POINT).astype(np.int64))


def expand(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For R rows with some items each: [sum] the row of every item, [sum] its index in the row."""
    rows = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(counts)
    return rows, np.arange(len(rows)) - (ends - counts)[rows]


def summed(
    rows: NDArray[np.int64], values: NDArray[np.float64], num_rows: int
) -> NDArray[np.float64]:
    """[num_rows] the sum of each row's values; rows may be empty."""
    sums: NDArray[np.float64] = np.bincount(rows, values, num_rows).astype(np.float64, copy=False)
    return sums
