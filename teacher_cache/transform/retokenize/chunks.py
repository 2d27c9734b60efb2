"""Likelihoods of chunks: shortest pieces of text that both tokenizers write in whole tokens.

They need no distribution, only the probabilities of the teacher's own tokens; approximate
likelihood matching trains on them (Minixhofer et al., arXiv 2503.20083).

Letters: M tokens of the student.
"""

import numpy as np
from numpy.typing import NDArray

from teacher_cache.transform.retokenize.alignment import Batch

UNKNOWN = np.float32(1)  # a chunk's logprob


def chunk_logprobs(batch: Batch) -> NDArray[np.float32]:
    """[M] the teacher's logprob of the chunk that ends with each token; NaN where none ends.

    `UNKNOWN` where a chunk begins inside one of the teacher's tokens, as after a mark that only
    the student's template writes, or holds one without a distribution.
    """
    found = np.full(len(batch.student_ids), np.nan, np.float32)
    is_end = batch.ends_on
    is_start = np.ones(len(is_end), bool)
    is_start[1:] = is_end[:-1] | (batch.student_response[1:] != batch.student_response[:-1])
    start_of = np.flatnonzero(is_start)[np.cumsum(is_start) - 1]
    ends = np.flatnonzero(is_end)
    first, behind = batch.level[start_of[ends]], batch.last[ends] + 1
    missing = np.concatenate([[0], np.cumsum(batch.k == 0)])
    is_known = (missing[behind] == missing[first]) & (batch.depth[start_of[ends]] == 0)
    logprobs = np.minimum(batch.log_realised(first, behind), 0.0)
    found[ends] = np.where(is_known, logprobs, UNKNOWN)
    return found


def of_prompt(num_tokens: int) -> NDArray[np.float32]:
    """[num_tokens] the same for a prompt: one chunk whose likelihood is unknown."""
    found = np.full(num_tokens, np.nan, np.float32)
    found[-1:] = UNKNOWN
    return found
