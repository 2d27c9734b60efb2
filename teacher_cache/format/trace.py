"""Trace: one token sequence with the teacher's distributions; the object both stages pass around.

Letters: m tokens held (all of the trace, or its first part), E kept entries of all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_K = 254  # the realised token may come on top of the top-k, and `k` is a uint8


@dataclass(frozen=True, eq=False)
class Trace:
    """Prompt, chain of thought and answer, with what the teacher said of each token.

    Entry t is the teacher's distribution over token t given the tokens before it. Its kept ids
    are in order of falling probability; the realised token is among them, last where it is not
    in the top-k. `k[t]` is 0 where there is no distribution (always for token 0).

    The bounds may lie beyond `m` where only the first part of a trace is held.
    """

    trace_id: str
    token_ids: NDArray[np.int32]  # [m]
    n_total: int  # tokens in the whole trace, m <= n_total
    cot_start: int  # first token of the chain of thought, its opening mark included
    answer_start: int  # first token after the closing mark; n_total if there is none
    k: NDArray[np.uint8]  # [m]
    top_ids: NDArray[np.int32]  # [E], flat, k[t] per token
    top_logits: NDArray[np.float32]  # [E], relative to the token's largest: 0, -0.47, ...
    tail_logit: NDArray[np.float32]  # [m], log(tail / (1 - tail)); 0 where k is 0
    finish_reason: str = "stop"
    fields: Mapping[str, Any] = field(default_factory=dict)  # the user's own, JSON values

    @property
    def num_entries(self) -> int:
        """Kept entries of all tokens held."""
        return len(self.top_ids)

    def validate(self) -> None:
        """Check every invariant that the class promises.

        Raises:
            ValueError: Naming the trace, what was expected and what was found.
        """
        where = f"trace {self.trace_id!r}"
        m = len(self.token_ids)
        if not 1 <= m <= self.n_total:
            raise ValueError(f"{where}: expected 1 to n_total={self.n_total} tokens, got {m}")
        if not 0 <= self.cot_start <= self.answer_start <= self.n_total:
            raise ValueError(
                f"{where}: expected 0 <= cot_start <= answer_start <= {self.n_total}, "
                f"got cot_start={self.cot_start}, answer_start={self.answer_start}"
            )
        if len(self.k) != m or len(self.tail_logit) != m:
            raise ValueError(
                f"{where}: expected {m} values in k and tail_logit, "
                f"got {len(self.k)} and {len(self.tail_logit)}"
            )
        num_entries = int(self.k.sum(dtype=np.int64))
        if len(self.top_ids) != num_entries or len(self.top_logits) != num_entries:
            raise ValueError(
                f"{where}: k adds up to {num_entries} entries, got {len(self.top_ids)} top_ids "
                f"and {len(self.top_logits)} top_logits"
            )
        if self.k[0] != 0:
            raise ValueError(f"{where}: token 0 has no distribution, got k[0]={self.k[0]}")
        self._validate_values(where)

    def _validate_values(self, where: str) -> None:
        if len(self.top_ids) and (self.token_ids.min() < 0 or self.top_ids.min() < 0):
            raise ValueError(f"{where}: token ids must not be negative")
        if not (np.isfinite(self.top_logits).all() and (self.top_logits <= 0).all()):
            raise ValueError(f"{where}: top_logits must be finite and at most 0")
        if not np.isfinite(self.tail_logit).all():
            raise ValueError(f"{where}: tail_logit must be finite")
        token_of_entry = np.repeat(np.arange(len(self.k)), self.k)
        # Sorting token by token: equal neighbours are an id that stands twice.
        keys = np.sort((token_of_entry << 32) | self.top_ids)
        twice = np.flatnonzero(keys[1:] == keys[:-1])
        if len(twice):
            raise ValueError(f"{where}: token {keys[twice[0]] >> 32} has an id twice")
        is_target = self.top_ids == self.token_ids[token_of_entry]
        found = np.bincount(token_of_entry[is_target], minlength=len(self.k))
        missing = np.flatnonzero((self.k > 0) & (found != 1))
        if len(missing):
            raise ValueError(
                f"{where}: token {missing[0]} must be once among its own kept ids, "
                f"found {found[missing[0]]} times"
            )
