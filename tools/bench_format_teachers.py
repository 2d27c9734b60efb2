"""Synthetic teachers with given entropies: rows of logprobs as an engine returns them.

A token's distribution over the vocabulary is one peak followed by a power law,

    p_0 : p_r = 1 : exp(-g) * r ** -b    for r = 1 ... V - 1,

with g found for each token from its entropy, which is drawn from the teacher's quantiles, and with
normal noise on the logits. Ids follow a Zipf law of exponent 1.1 over the vocabulary, the most
frequent first, as in a BPE vocabulary.

Letters: R rows (tokens), K candidates per row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

VOCAB_SIZE = 151_936
ZIPF_EXPONENT = 1.1
LOGIT_NOISE = 0.25  # nats


@dataclass(frozen=True)
class SyntheticTeacher:
    """Distribution that a teacher's rows are drawn from."""

    name: str
    quantiles: tuple[tuple[float, float], ...]  # (share of tokens, their entropy at most, nats)
    exponent: float  # b
    lengths: tuple[int, int]  # shortest and longest trace, tokens
    median_length: int


REASONING = SyntheticTeacher(
    "reasoning",
    # More than half below 0.01 nat and the 80th percentile at 0.672: Qwen3-8B's chains of thought
    # in arXiv 2506.01939.
    ((0.0, 1e-6), (0.4, 7e-4), (0.56, 0.009), (0.72, 0.03), (0.8, 0.705), (0.95, 1.6), (1.0, 2.6)),
    exponent=2.1,
    lengths=(500, 9000),
    median_length=2300,
)
TEXT = SyntheticTeacher(
    "text",
    ((0.0, 0.02), (0.1, 0.8), (0.5, 3.4), (0.9, 5.4), (1.0, 6.6)),
    exponent=1.2,
    lengths=(500, 9000),
    median_length=2300,
)
SHORT = SyntheticTeacher(
    "short", REASONING.quantiles, REASONING.exponent, lengths=(60, 300), median_length=140
)
TEACHERS = {teacher.name: teacher for teacher in (REASONING, TEXT, SHORT)}


@dataclass(frozen=True)
class Rows:
    """One trace: its tokens, and a row of candidates for each token but the first."""

    token_ids: NDArray[np.int32]  # [R + 1]
    ids: NDArray[np.int32]  # [R, 1 + K], the target token, then by falling probability
    logprobs: NDArray[np.float32]  # [R, 1 + K]
    entropy: NDArray[np.float64]  # [R] nats, over the whole vocabulary


def traces(
    teacher: SyntheticTeacher, num_tokens: int, num_candidates: int, seed: int
) -> Iterator[Rows]:
    """Yield traces until they hold at least `num_tokens` tokens."""
    rng = np.random.default_rng(seed)
    source = _Source(teacher, num_candidates)
    done = 0
    while done < num_tokens:
        length = int(np.clip(rng.lognormal(np.log(teacher.median_length), 0.6), *teacher.lengths))
        yield source.rows(length - 1, rng)
        done += length


class _Source:
    def __init__(self, teacher: SyntheticTeacher, num_candidates: int) -> None:
        self._teacher = teacher
        self._num_candidates = num_candidates
        ranks = np.arange(1, VOCAB_SIZE, dtype=np.float64)
        power = ranks**-teacher.exponent
        self._log_gap = teacher.exponent * np.log(ranks[: num_candidates - 1])
        # Sums over all ranks give mass and entropy of any g; those beyond K make the tail.
        total, mean = power.sum(), (power * teacher.exponent * np.log(ranks)).sum()
        self._tail = power[num_candidates - 1 :].sum()
        self._tail_mean = (
            power[num_candidates - 1 :] * teacher.exponent * np.log(ranks[num_candidates - 1 :])
        ).sum()
        self._leads = np.linspace(25.0, -6.0, 4000)
        mass = 1 + np.exp(-self._leads) * total
        self._entropies = np.log(mass) + np.exp(-self._leads) * (self._leads * total + mean) / mass
        self._rising = np.maximum.accumulate(self._entropies)
        popularity = np.arange(1, VOCAB_SIZE + 1, dtype=np.float64) ** -ZIPF_EXPONENT
        self._cumulative = np.cumsum(popularity) / popularity.sum()

    def rows(self, num_rows: int, rng: np.random.Generator) -> Rows:
        shares, values = np.array(self._teacher.quantiles).T
        wanted = np.exp(np.interp(rng.random(num_rows), shares, np.log(values)))
        lead = np.interp(wanted, self._rising, self._leads)
        gaps = np.empty((num_rows, self._num_candidates))
        gaps[:, 0] = 0.0
        gaps[:, 1:] = lead[:, None] + self._log_gap
        gaps[:, 1:] += rng.normal(0.0, LOGIT_NOISE, (num_rows, self._num_candidates - 1))
        gaps.sort(axis=1)
        outside = np.exp(-lead) * self._tail
        log_mass = np.log(np.exp(-gaps).sum(axis=1) + outside)
        logprobs = -gaps - log_mass[:, None]
        entropy = -(np.exp(logprobs) * logprobs).sum(axis=1) + np.exp(-lead - log_mass) * (
            (lead + log_mass) * self._tail + self._tail_mean
        )
        ids = self._distinct_ids(num_rows, rng)
        place = self._realised(logprobs, rng)
        rows = np.arange(num_rows)
        last = np.minimum(place, self._num_candidates - 1)
        inside = place < self._num_candidates
        other = self._zipf(num_rows, rng)
        inside |= (ids == other[:, None]).any(axis=1)  # rare: then take the last candidate
        realised = np.where(inside, ids[rows, last], other)
        realised_logprob = np.where(inside, logprobs[rows, last], logprobs[:, -1] - 2.0)
        return Rows(
            token_ids=np.concatenate([[0], realised]).astype(np.int32),
            ids=np.concatenate([realised[:, None], ids], axis=1).astype(np.int32),
            logprobs=np.concatenate([realised_logprob[:, None], logprobs], axis=1).astype("f4"),
            entropy=entropy,
        )

    def _zipf(self, shape: int | tuple[int, ...], rng: np.random.Generator) -> NDArray[np.int64]:
        drawn: NDArray[np.int64] = np.searchsorted(self._cumulative, rng.random(shape))
        return drawn

    def _distinct_ids(self, num_rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """[R, K]: Zipf ids, drawn again where a row has one twice."""
        ids = self._zipf((num_rows, self._num_candidates), rng)
        while True:
            order = np.argsort(ids, axis=1, kind="stable")
            ranked = np.take_along_axis(ids, order, axis=1)
            again = np.zeros(ids.shape, bool)
            np.put_along_axis(again[:, :], order[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
            if not again.any():
                return ids
            ids[again] = self._zipf(int(again.sum()), rng)

    def _realised(
        self, logprobs: NDArray[np.float64], rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """[R] rank of the token drawn from each row; K where it lies outside the candidates."""
        cumulative = np.cumsum(np.exp(logprobs), axis=1)
        place: NDArray[np.int64] = (cumulative < rng.random(len(logprobs))[:, None]).sum(axis=1)
        return place
