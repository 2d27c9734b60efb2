"""Chunks of a derived trace: text that the teacher's tokenizer and the student's both write whole.

Letters: m tokens of a trace, n of them in the loss, c chunks.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format import Trace

_NONE = -1


@dataclass(frozen=True)
class WholeChunks:
    """The chunks of known likelihood whose tokens are all in the loss."""

    of_token: NDArray[np.int64]  # [n] chunk of each loss token; -1 for none
    logprob: NDArray[np.float32]  # [c]

    @classmethod
    def of(cls, trace: Trace, valid: NDArray[np.int64]) -> "WholeChunks":
        """The chunks of a trace.

        Args:
            trace: A trace with chunk_logprob.
            valid: [n] the loss tokens, ascending.

        Raises:
            ValueError: If the trace has none.
        """
        if trace.chunk_logprob is None:
            raise ValueError(f"trace {trace.trace_id!r} has no chunk_logprob")
        ends = np.flatnonzero(~np.isnan(trace.chunk_logprob))
        of_token = np.searchsorted(ends, valid)
        lengths = np.diff(ends, prepend=-1)
        logprob = trace.chunk_logprob[ends]
        num_in_loss = np.bincount(of_token, minlength=len(ends))[: len(ends)]
        is_usable = (num_in_loss == lengths) & (logprob <= 0)
        numbers = np.full(len(ends) + 1, _NONE)  # the last is text after the last chunk
        numbers[:-1][is_usable] = np.arange(is_usable.sum())
        return cls(numbers[of_token], logprob[is_usable])

    def within(self, is_kept: NDArray[np.bool_]) -> "WholeChunks":
        """The same for some of the loss tokens; none of a chunk may be left out."""
        return WholeChunks(self.of_token[is_kept], self.logprob)
