"""Measures a capture's noise floor: its first traces once more, in another batch."""

import logging
from collections.abc import Iterator

import numpy as np

from teacher_cache.engines import EngineError, Teacher, TeacherRequest, TeacherRows
from teacher_cache.engines.distance import LiveRows, divergence, logprobs_at, tails
from teacher_cache.engines.transformers import OTHER_CHUNK_TOKENS, TransformersTeacher
from teacher_cache.format import NoiseFloor

logger = logging.getLogger(__name__)

_NUM_TRACES = 4
_MAX_ROWS = 512  # of each: a few thousand tokens take a GPU less than a second
_MAX_TOKENS = 1536  # of each, prompt included: 1 GB of logits at V = 152k
_LEAST_LOGPROB = -1e4  # for -inf: no probability, and no NaN
PREFIX = "noise-"  # of the repeated requests' names


class Repeats:
    """The first traces of a run, as the engine gave them, to be scored again at its end."""

    def __init__(self) -> None:
        self._first: dict[str, TeacherRows] = {}

    def keep(self, rows: TeacherRows) -> None:
        """Remember the rows of a trace, if it is among the first that can be repeated."""
        if len(self._first) < _NUM_TRACES:
            begin = _begin_of(rows)
            if len(begin.row_ids):
                self._first[f"{PREFIX}{len(self._first)}"] = begin

    def measure(self, teacher: Teacher) -> NoiseFloor | None:
        """Score them again, the last first, all in one batch.

        Captured rows stem from whatever batch their trace was in; generated ones from decoding
        token by token. Scoring computes the same tokens at once, in other company.

        Returns:
            None if there is nothing to compare, or the engine fails: all traces are kept by then,
            and a capture must not end for want of a figure about it.
        """
        try:
            return self._measured(teacher)
        except EngineError as error:
            logger.warning("the capture's noise floor is not known: %s", error)
            return None

    def _measured(self, teacher: Teacher) -> NoiseFloor | None:
        if isinstance(teacher, TransformersTeacher):  # or it would repeat what it did while scoring
            teacher.chunk_tokens = OTHER_CHUNK_TOKENS
        found = []
        for again in teacher.run(self._requests()):
            first = self._first[again.request_id]
            later = LiveRows(again.row_ids, again.row_logprobs)
            later = later.part(slice(first.first_row - again.first_row, None))
            num_rows = min(len(first.row_ids), len(later.ids))
            k = np.full(num_rows, first.row_ids.shape[1] - 1, np.uint8)
            ids = first.row_ids[:num_rows, 1:].ravel()
            before = first.row_logprobs[:num_rows, 1:].astype(np.float64).ravel()
            after, _ = logprobs_at(later.part(slice(num_rows)), k, ids)
            before, after = (np.maximum(each, _LEAST_LOGPROB) for each in (before, after))
            found.append(divergence(k, before, tails(k, before), after, tails(k, after)))
        kl = np.concatenate([np.zeros(0), *found])
        if not len(kl):
            logger.warning(
                "the capture's noise floor is not known: no trace has rows of its own within "
                "%d tokens, prompt included", _MAX_TOKENS,
            )  # fmt: skip
            return None
        return NoiseFloor(
            mean=float(kl.mean()),
            p99=float(np.quantile(kl, 0.99)),
            max=float(kl.max()),
            num_traces=len(found),
            num_tokens=len(kl),
        )

    def _requests(self) -> Iterator[TeacherRequest]:
        for name, rows in reversed(self._first.items()):
            tokens = tuple(rows.token_ids.tolist())
            yield TeacherRequest(name, tokens, max_new_tokens=0, seed=0, capture_prompt=True)


def _begin_of(rows: TeacherRows) -> TeacherRows:
    """A copy of a trace's first tokens, without its last one: scoring needs room for a token."""
    num_tokens = min(rows.first_row + _MAX_ROWS, _MAX_TOKENS, len(rows.token_ids) - 1)
    num_rows = max(0, num_tokens - rows.first_row)
    return TeacherRows(
        rows.request_id,
        rows.token_ids[:num_tokens].copy(),
        rows.num_given,
        rows.first_row,
        rows.row_ids[:num_rows].copy(),
        rows.row_logprobs[:num_rows].copy(),
        rows.finish_reason,
    )
