"""Trace: one token sequence with the teacher's distributions; the object both stages pass around.

Letters: m tokens held (all of the trace, or its first part), E kept entries of all of these.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format.codec import stored_logprobs
from teacher_cache.format.ragged import entry_offsets, row_of_entry, tail_mass

MAX_K = 254  # the target token may come on top of the top-k, and `k` is a uint8
OPTIONAL_COLUMNS = ("chunk_logprob", "student_logprob")  # of a trace: a float32 per token
SECTIONS = ("prompt", "cot", "answer")  # of a trace, in order


class TokenLogprobs(NamedTuple):
    """The teacher's kept entries for one token, most probable first; empty without a distribution.

    The token itself is among them, last if it is not in the top-k. Together with the token's
    `Trace.tail`, the probabilities sum to one.
    """

    ids: NDArray[np.int32]  # [k]
    logprobs: NDArray[np.float64]  # [k], nats


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """Prompt, chain of thought and answer, with the teacher's distribution over each token.

    `len(trace)` is m, `trace[:n]` the trace cut to its first n tokens, `trace.logprobs(t)`
    the teacher's entries for token t. The arrays are constant: derived values are cached.

    Entry t is the teacher's distribution over token t given the tokens before it. Its kept ids
    are in order of falling probability; the target token is among them, last if it is not
    in the top-k. `k[t]` is 0 if there is no distribution (always for token 0).

    The bounds may lie beyond `m` if only the first part of a trace is held.
    """

    trace_id: str
    token_ids: NDArray[np.int32]  # [m]
    n_total: int  # tokens in the whole trace, m <= n_total
    cot_start: int  # first token of the chain of thought, its opening mark included
    answer_start: int  # first token after the closing mark; n_total if there is none
    k: NDArray[np.uint8]  # [m]
    top_ids: NDArray[np.int32]  # [E], flat, k[t] per token
    top_logits: NDArray[np.float32]  # [E], relative to the token's largest: 0, -0.47, ...
    tail_logit: NDArray[np.float32]  # [m], log(tail / (1 - tail)); 0 if k is 0
    # [m], in caches made for another tokenizer. A chunk is a shortest piece of the response's text
    # that both tokenizers write in whole tokens, or the whole prompt: where one ends, the teacher's
    # logprob of it, or 1 if that is unknown; NaN elsewhere.
    chunk_logprob: NDArray[np.float32] | None = None
    # [m], in caches of a student's rollouts: the logprob, at temperature 1, that the student gave
    # each token when it sampled it; NaN for the prompt's tokens, which it did not sample.
    student_logprob: NDArray[np.float32] | None = None
    finish_reason: str = "stop"
    fields: Mapping[str, Any] = field(default_factory=dict)  # the user's own, JSON values

    def __len__(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        num_tokens = f"{len(self):,}"
        if len(self) < self.n_total:
            num_tokens += f" of {self.n_total:,}"
        counts = np.bincount(self.section_of_token, minlength=len(SECTIONS)).tolist()
        parts = ", ".join(f"{name} {n:,}" for name, n in zip(SECTIONS, counts, strict=True))
        return (
            f"Trace({self.trace_id!r}: {num_tokens} tokens ({parts}), {self.num_entries:,} entries)"
        )

    def __getitem__(self, tokens: slice) -> "Trace":
        """The trace cut to its first tokens: `trace[:n]`, or `trace[:-n]` without the last n.

        `n_total` and the bounds stay those of the whole trace, as when a cache is read to a lead
        span. Entry t depends on the tokens before it, so only a prefix is a valid trace.

        Raises:
            TypeError: If `tokens` is not a slice; use `logprobs(t)` for one token.
            ValueError: If it leaves out the first token or steps over some, or leaves none.
        """
        if not isinstance(tokens, slice):
            raise TypeError(
                f"trace[{tokens!r}]: expected a slice trace[:n]; one token's entries are "
                f"trace.logprobs({tokens!r}), its id is trace.token_ids[{tokens!r}]"
            )
        first, end, step = tokens.indices(len(self))
        if first != 0 or step != 1 or end < 1:
            raise ValueError(
                f"trace {self.trace_id!r}: expected a slice [:n] that begins at the first of its "
                f"{len(self):,} tokens and holds one, got [{first}:{end}:{step}]"
            )
        entries = int(self.entry_offsets[end])
        return replace(
            self,
            token_ids=self.token_ids[:end],
            k=self.k[:end],
            top_ids=self.top_ids[:entries],
            top_logits=self.top_logits[:entries],
            tail_logit=self.tail_logit[:end],
            chunk_logprob=None if self.chunk_logprob is None else self.chunk_logprob[:end],
            student_logprob=None if self.student_logprob is None else self.student_logprob[:end],
        )

    @property
    def num_entries(self) -> int:
        """Number of kept entries of all tokens held."""
        return len(self.top_ids)

    @cached_property
    def entry_offsets(self) -> NDArray[np.int64]:
        """[m + 1] start of each token's entries in `top_ids`, and the end of the last one's."""
        return entry_offsets(self.k)

    @cached_property
    def tail(self) -> NDArray[np.float64]:
        """[m] the teacher's probability outside the kept entries; NaN without a distribution."""
        return np.where(self.k > 0, tail_mass(self.tail_logit), np.nan)

    @cached_property
    def section_of_token(self) -> NDArray[np.int64]:
        """[m] index into `SECTIONS` of every token."""
        bounds = np.array([self.cot_start, self.answer_start])
        return np.searchsorted(bounds, np.arange(len(self)), side="right")

    @cached_property
    def entropy(self) -> NDArray[np.float64]:
        """[m] entropy in nats, the tail counted as one outcome; 0 without a distribution."""
        terms_E = -np.exp(self.top_logprobs) * self.top_logprobs
        kept = np.bincount(self.token_of_entry, weights=terms_E, minlength=len(self))
        log_tail = -np.logaddexp(0.0, -self.tail_logit.astype(np.float64))
        return np.where(self.k > 0, kept - np.exp(log_tail) * log_tail, 0.0)

    # The following are [E], several times the trace itself, so each access computes them again.

    @property
    def token_of_entry(self) -> NDArray[np.int64]:
        """[E] the token that each kept entry belongs to."""
        return row_of_entry(self.k)

    @property
    def top_logprobs(self) -> NDArray[np.float64]:
        """[E] logprobs of the kept entries in nats, beside `top_ids`."""
        return stored_logprobs(self.k, self.top_logits, self.tail_logit)

    def logprobs(self, t: int) -> TokenLogprobs:
        """The teacher's entries for token t, given the tokens before it.

        Args:
            t: Position of the token, 0 to m - 1; counted from the end if negative.

        Raises:
            IndexError: If the trace holds no such token.
        """
        t = self._place(t)
        entries = slice(*self.entry_offsets[t : t + 2].tolist())
        one = slice(t, t + 1)
        logprobs = stored_logprobs(self.k[one], self.top_logits[entries], self.tail_logit[one])
        return TokenLogprobs(self.top_ids[entries], logprobs)

    def section(self, t: int) -> str:
        """Name of the section that token t is in, one of `SECTIONS`; raises as `logprobs`."""
        return SECTIONS[self.section_of_token[self._place(t)]]

    def _place(self, t: int) -> int:
        if not -len(self) <= t < len(self):
            raise IndexError(
                f"trace {self.trace_id!r}: expected a token of 0 to {len(self) - 1}, got {t}"
            )
        return t % len(self)

    def validate(self) -> None:
        """Check every invariant of the class.

        Raises:
            ValueError: Names the trace, what was expected and what was found.
        """
        where = f"trace {self.trace_id!r}"
        m = len(self)
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
        for name in OPTIONAL_COLUMNS:
            column = getattr(self, name)
            if column is not None and len(column) != m:
                raise ValueError(f"{where}: expected {m} values in {name}, got {len(column)}")
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
        token_of_entry = self.token_of_entry
        # Sorted within each token: equal neighbours are a repeated id. Narrow keys sort faster.
        num_bits = int(self.top_ids.max(initial=0)).bit_length()
        is_narrow = len(self) << num_bits < 1 << 31
        tokens = token_of_entry.astype(np.int32) if is_narrow else token_of_entry
        keys = np.sort((tokens << num_bits) | self.top_ids)
        twice = np.flatnonzero(keys[1:] == keys[:-1])
        if len(twice):
            raise ValueError(f"{where}: token {keys[twice[0]] >> num_bits} has a repeated id")
        is_target = self.top_ids == self.token_ids[token_of_entry]
        found = np.bincount(token_of_entry[is_target], minlength=len(self.k))
        missing = np.flatnonzero((self.k > 0) & (found != 1))
        if len(missing):
            raise ValueError(
                f"{where}: token {missing[0]} must occur once among its own kept ids, "
                f"found {found[missing[0]]} times"
            )
