"""Distances of stored distributions from an engine's rows: the arithmetic of an audit.

Letters: R rows (tokens with a distribution), K candidates per row, E kept entries of all rows,
V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from teacher_cache.engines import TeacherRows
from teacher_cache.engines.distance import (
    ROWS_AT_ONCE,
    LiveRows,
    divergence,
    logprobs_at,
    tails,
)
from teacher_cache.format import (
    CacheHeader,
    KeepPolicy,
    Trace,
    entry_offsets,
    keep_entries,
    stored_logprobs,
    tail_mass,
)

_Floats = NDArray[np.float64]


def cut_loss(live: LiveRows, top_k: int, mass: float, vocab_size: int) -> _Floats:
    """[R] KL in nats from whole rows to their stored form: kept entries and an even tail.

    This is the most that a student can lose by the cut, as dropped ids share mass evenly.
    If rows are narrower than the vocabulary, the part beyond them counts as even, so that the
    result is a lower bound.

    Args:
        live: R rows of an engine.
        top_k: Largest number of entries kept, besides the token itself.
        mass: Probability that the kept entries must reach, with as few as possible.
        vocab_size: V.
    """
    pieces = [
        _cut_loss(live.part(slice(first, first + ROWS_AT_ONCE)), top_k, mass, vocab_size)
        for first in range(0, len(live.ids), ROWS_AT_ONCE)
    ]
    return np.concatenate([np.zeros(0), *pieces])


def _cut_loss(live: LiveRows, top_k: int, mass: float, vocab_size: int) -> _Floats:
    logprobs = live.logprobs[:, 1:].astype(np.float64)
    probs, own = np.exp(logprobs), np.exp(live.logprobs[:, 0].astype(np.float64))
    masses = np.cumsum(probs[:, :top_k], axis=1)
    num_kept = np.minimum(np.count_nonzero(masses < mass, axis=1) + 1, masses.shape[1])
    is_top = np.arange(logprobs.shape[1]) < num_kept[:, None]
    is_own = live.ids[:, 1:] == live.ids[:, :1]
    is_dropped = ~is_top & ~is_own
    comes_on_top = ~(is_own & is_top).any(axis=1)  # the token itself, if it is not in the top-k
    is_beyond = ~is_own.any(axis=1)  # it is not among the candidates either
    num_unknown = vocab_size - logprobs.shape[1] - is_beyond
    unknown = np.where(num_unknown > 0, 1 - probs.sum(axis=1) - own * is_beyond, 0.0).clip(0)
    num_dropped = vocab_size - num_kept - comes_on_top
    dropped = np.where(is_dropped, probs, 0.0).sum(axis=1) + unknown
    inside = _x_log(np.where(is_dropped, probs, 0.0), probs).sum(axis=1)
    inside += _x_log(unknown, unknown / np.maximum(num_unknown, 1))
    loss: _Floats = inside - _x_log(dropped, dropped / np.maximum(num_dropped, 1))
    return loss.clip(0)


def _x_log(x: _Floats, y: _Floats) -> _Floats:
    """X * log(y), 0 where x is 0."""
    result: _Floats = x * np.log(np.where(x > 0, y, 1.0))
    return result


@dataclass
class Compared:
    """One trace with an engine's rows for it; its R rows are the tokens with a distribution."""

    trace_id: str
    tokens: NDArray[np.int64]  # [R] their places in the trace
    k: NDArray[np.uint8]
    live: NDArray[np.float64]  # [E] the engine's logprobs of the stored ids
    kl: NDArray[np.float64]
    kl_if_moved: Mapping[int, NDArray[np.float64]]
    is_top1: NDArray[np.bool_]
    nll_stored: NDArray[np.float64]
    nll_live: NDArray[np.float64]
    cut_by_top_k: NDArray[np.float64]
    cut_by_both: NDArray[np.float64]
    rounding: NDArray[np.float64]  # KL from the engine's rows as they would be stored, to them
    num_outside: int
    noise: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))


def _stored(
    trace: Trace, num_tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.bool_]]:
    """Tokens with a distribution among the first ones, their k, and their entries."""
    tokens = np.flatnonzero(trace.k[:num_tokens] > 0)
    return tokens, trace.k[tokens], trace.token_of_entry < num_tokens


def compare_trace(trace: Trace, rows: TeacherRows, header: CacheHeader) -> Compared:
    """Compare the stored distributions of a trace with an engine's rows for it."""
    tokens, k, is_used = _stored(trace, len(rows.token_ids))
    ids = trace.top_ids[is_used]
    stored, tail = trace.top_logprobs[is_used], trace.tail[tokens]
    everything = LiveRows(rows.row_ids, rows.row_logprobs)
    own = tokens - rows.first_row
    live = everything.part(own)
    live_logprobs, is_there = logprobs_at(live, k, ids)
    moved = {}
    for step in (-1, 1):
        is_inside = (own + step >= 0) & (own + step < len(rows.row_ids))
        entries = np.repeat(is_inside, k)
        other = everything.part(own[is_inside] + step)
        logprobs, _ = logprobs_at(other, k[is_inside], ids[entries])
        moved[step] = divergence(
            k[is_inside], stored[entries], tail[is_inside],
            logprobs, tails(k[is_inside], logprobs),
        )  # fmt: skip
    is_own = ids == np.repeat(trace.token_ids[tokens], k)
    first_ids = ids[entry_offsets(k)[:-1]]
    return Compared(
        trace_id=trace.trace_id,
        tokens=tokens,
        k=k,
        live=live_logprobs,
        kl=divergence(k, stored, tail, live_logprobs, tails(k, live_logprobs)),
        kl_if_moved=moved,
        is_top1=first_ids == live.ids[:, 1],
        nll_stored=-stored[is_own],
        nll_live=-live.logprobs[:, 0].astype(np.float64),
        cut_by_top_k=cut_loss(live, header.top_k, 1.0, header.vocab_size),
        cut_by_both=cut_loss(live, header.top_k, header.mass, header.vocab_size),
        rounding=_rounding(live, header),
        num_outside=int((~is_there).sum()),
    )


def _rounding(live: LiveRows, header: CacheHeader) -> _Floats:
    """[R] KL in nats from rows that were stored and read back, to the rows themselves."""
    kept = keep_entries(live.ids, live.logprobs, KeepPolicy(header.top_k, header.mass))
    stored = stored_logprobs(kept.k, kept.top_logits, kept.tail_logit)
    exact, _ = logprobs_at(live, kept.k, kept.top_ids)
    return divergence(kept.k, stored, tail_mass(kept.tail_logit), exact, tails(kept.k, exact))


def add_noise(compared: Compared, trace: Trace, rows: TeacherRows) -> None:
    """Compare an engine's rows with those of its first pass."""
    k, ids = compared.k, trace.top_ids[_stored(trace, len(rows.token_ids))[2]]
    again, _ = logprobs_at(
        LiveRows(rows.row_ids, rows.row_logprobs).part(compared.tokens - rows.first_row), k, ids
    )
    first = compared.live
    compared.noise = divergence(k, first, tails(k, first), again, tails(k, again))
