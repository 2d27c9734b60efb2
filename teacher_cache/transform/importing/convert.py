"""ForeignTrace -> FinishedTrace: rows put to their tokens, checked, sorted, and stored as ours.

Letters: R rows (distributions), K entries per row.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format import FinishedTrace, KeepPolicy, Trace, content_hash, keep_entries
from teacher_cache.sources import (
    BadRow,
    Reason,
    find_last,
    find_sections,
    given_id,
    opening_token,
    own_fields,
)
from teacher_cache.sources.marks import ThinkMarks
from teacher_cache.sources.tokenizer import TeacherTokenizer
from teacher_cache.transform.importing.foreign import ForeignTrace
from teacher_cache.transform.importing.placing import better_place, first_token, placed_rows

# Largest excess over 1 of a row's probabilities. What servers and models write in float32 or
# bfloat16 stays below the first, DistillKit's polynomials below the second.
EXACT_EXCESS, FITTED_EXCESS = 0.004, 0.05
_LEAST_OWN = 0.5  # share of a trace's rows that must hold their own token


@dataclass(frozen=True)
class Meaning:
    """What the rows of an input are, the same for all of them."""

    shift: int  # tokens between a row and its own token; see `placing`
    has_tails: bool  # whether values are logprobs over the whole vocabulary
    largest_excess: float  # of a row's sum over 1, where they are


@dataclass
class Counts:
    """What became of the tokens of the traces imported now."""

    num_tokens: int = 0
    num_rows: int = 0  # distributions kept
    num_without_own: int = 0  # left out: the row does not have its own token's logprob


@dataclass(frozen=True)
class Converter:
    """Makes traces; one for a whole input."""

    tokenizer: TeacherTokenizer
    vocab_size: int
    policy: KeepPolicy
    meaning: Meaning
    id_field: str
    marks: ThinkMarks | None
    counts: Counts = field(default_factory=Counts)

    def __call__(self, foreign: ForeignTrace, row: Mapping[str, Any]) -> FinishedTrace:
        """One trace in our format; raises BadRow."""
        tokens = foreign.token_ids
        if len(tokens) < 2:
            raise BadRow(Reason.TRACE_TOO_SHORT, "one token, which has no distribution")
        self._check_ids(tokens, "token")
        has_row, row_ids, logprobs = self._placed(foreign)
        kept = keep_entries(row_ids, logprobs, self.policy)
        k, tail_logit = np.zeros(len(tokens), np.uint8), np.zeros(len(tokens), np.float32)
        k[has_row], tail_logit[has_row] = kept.k, kept.tail_logit
        cot_start, answer_start = self._bounds(foreign)
        self.counts.num_tokens += len(tokens)
        self.counts.num_rows += int(has_row.sum())
        source = foreign.source
        trace = Trace(
            trace_id=self.trace_id(foreign, row),
            token_ids=tokens,
            n_total=len(tokens),
            cot_start=cot_start,
            answer_start=answer_start,
            k=k,
            top_ids=kept.top_ids,
            top_logits=kept.top_logits,
            tail_logit=tail_logit,
            finish_reason=foreign.finish_reason or "scored",
            fields=own_fields(row, self.id_field, *foreign.used)
            if source is None
            else source.fields,
        )
        return FinishedTrace(
            trace,
            source_hash(foreign),
            kept.num_clamped_tails,
            kept.num_clamped_logits,
            messages=None if source is None else source.messages,
        )

    def trace_id(self, foreign: ForeignTrace, row: Mapping[str, Any]) -> str:
        """The row's own id, or a hash of its tokens; and which of the row's traces it is."""
        named = given_id(row, self.id_field)
        return (named or content_hash(foreign.token_ids.tolist())[:16]) + foreign.suffix

    def _placed(
        self, foreign: ForeignTrace
    ) -> tuple[NDArray[np.bool_], NDArray[np.int32], NDArray[np.float32]]:
        """[n] which tokens have a distribution, and [R, 1 + K] ids and logprobs of these."""
        first = first_token(foreign, self.meaning.shift)
        if len(foreign.top_ids) > len(foreign.token_ids):
            raise BadRow(
                Reason.BAD_DISTRIBUTIONS,
                f"{len(foreign.top_ids)} rows for {len(foreign.token_ids)} tokens",
            )
        rows = placed_rows(foreign, first)
        ids, values = foreign.top_ids[rows], foreign.values[rows]
        at = first + np.arange(len(foreign.top_ids))[rows]
        has_any = np.isfinite(values).any(axis=1) if values.size else np.zeros(len(values), bool)
        ids, values, at = ids[has_any], values[has_any], at[has_any]
        if not len(at):
            raise BadRow(Reason.BAD_DISTRIBUTIONS, "no token has a distribution")
        order = np.argsort(-values, axis=1, kind="stable")
        ids, values = np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1)
        self._check_ids(ids[np.isfinite(values)], "candidate")
        logprobs = self._logprobs(values, at)
        own = (ids == foreign.token_ids[at][:, None]) & np.isfinite(values)
        _check_distinct(ids, values, at)
        moved = better_place(foreign, first)
        if moved is not None:
            raise BadRow(
                Reason.ROWS_OF_OTHER_TOKENS,
                f"its rows fit its tokens clearly better {moved:+d} tokens from where they are "
                f"placed (a shift of {self.meaning.shift} in this file): import such rows apart",
            )
        has_own = own.any(axis=1)
        if has_own.mean() < _LEAST_OWN:
            raise BadRow(
                Reason.ROWS_OF_OTHER_TOKENS,
                f"only {has_own.mean():.0%} of its rows hold the token that they stand for: they "
                "are of another tokenizer, trace or shift (--row-shift)",
            )
        self.counts.num_without_own += int((~has_own).sum())
        ids, logprobs, own, at = ids[has_own], logprobs[has_own], own[has_own], at[has_own]
        own_logprobs = logprobs[np.arange(len(at)), own.argmax(axis=1)]
        has_row = np.zeros(len(foreign.token_ids), bool)
        has_row[at] = True
        return (
            has_row,
            np.column_stack([foreign.token_ids[at], ids]).astype(np.int32),
            np.column_stack([own_logprobs, logprobs]).astype(np.float32),
        )

    def _logprobs(self, values: NDArray[np.float32], at: NDArray[np.int64]) -> NDArray[np.float32]:
        """[R, K] values as logprobs; over the entries alone where tails are unknown."""
        sums = log_sums(values)
        if not self.meaning.has_tails:
            return (values - sums[:, None]).astype(np.float32)
        wrong = np.flatnonzero(np.expm1(sums) > self.meaning.largest_excess)
        if len(wrong):
            raise BadRow(
                Reason.NOT_NORMALISED,
                f"the probabilities of token {at[wrong[0]]}'s entries add up to "
                f"{np.exp(sums[wrong[0]]):.4g}: its values are no logprobs at temperature 1",
            )
        return values

    def _check_ids(self, ids: NDArray[np.int32], what: str) -> None:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            wrong = int(ids.max()) if ids.max() >= self.vocab_size else int(ids.min())
            raise BadRow(
                Reason.TOKEN_OUTSIDE_VOCABULARY,
                f"{what} id {wrong} is outside the teacher's vocabulary of {self.vocab_size}",
            )

    def _bounds(self, foreign: ForeignTrace) -> tuple[int, int]:
        """Sections of a trace: after the prompt if it is known, else at the last opening mark."""
        if foreign.source is not None and foreign.source.bounds is not None:
            return foreign.source.bounds
        ids, marks = foreign.token_ids.tolist(), self.marks
        num_prompt = foreign.num_prompt
        if num_prompt is None:
            mark = self.tokenizer.encode(marks.open) if marks is not None and marks.open else []
            num_prompt = max(find_last(ids, mark), 0) if mark else 0
        if num_prompt > len(ids):
            raise BadRow(
                Reason.BAD_BOUNDS, f"a prompt of {num_prompt} tokens in a trace of {len(ids)}"
            )
        opened_at = None
        if marks is not None and marks.open and num_prompt:
            prompt = ids[:num_prompt]
            if self.tokenizer.decode(prompt[-_MARK_TOKENS:]).rstrip().endswith(marks.open.rstrip()):
                opened_at = opening_token(prompt, marks.open.rstrip(), self.tokenizer)
        return find_sections(ids, num_prompt, opened_at, marks, self.tokenizer)


_MARK_TOKENS = 32  # an opening mark is shorter


def log_sums(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """[R] log of the sum of exp(value) over each row's entries."""
    largest = values.max(axis=1).astype(np.float64)
    sums: NDArray[np.float64] = largest + np.log(
        np.exp(values - largest[:, None], dtype=np.float64).sum(axis=1)
    )
    return sums


def source_hash(foreign: ForeignTrace) -> str:
    """Hash of a trace's tokens and values, which reveals a changed row under the same id."""
    digest = hashlib.sha256()
    for array in (foreign.token_ids, foreign.top_ids, foreign.values):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:32]


def _check_distinct(
    ids: NDArray[np.int32], values: NDArray[np.float32], at: NDArray[np.int64]
) -> None:
    absent = -1 - np.arange(ids.shape[1])  # no two alike
    keys = np.sort(np.where(np.isfinite(values), ids, absent), axis=1)
    twice = np.flatnonzero((keys[:, 1:] == keys[:, :-1]).any(axis=1))
    if len(twice):
        raise BadRow(Reason.BAD_DISTRIBUTIONS, f"token {at[twice[0]]} has the same candidate twice")
