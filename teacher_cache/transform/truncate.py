"""`cache-teacher truncate`: a smaller cache with the first part of every trace of another.

Tokens and entries are those of the full cache, split into new bands without a new choice. Logits
of a cache with another grid are rounded to this version's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format import (
    LOGIT_GRID,
    Cache,
    CacheMismatchError,
    CachePath,
    CacheWriter,
    FinishedTrace,
    KeepPolicy,
    Manifest,
    lead_span_lengths,
    narrowed,
    rows_by_shard,
    seal_cache,
)
from teacher_cache.format.codec import is_clamped_tail
from teacher_cache.format.lead_spans import LeadSpans, parse_span
from teacher_cache.format.span_draw import drawn_choice
from teacher_cache.terminal.option import check_options, option


@dataclass(frozen=True, kw_only=True)
class TruncateConfig:
    """`cache-teacher truncate`."""

    cache: CachePath = option("Folder or URI of the cache.", is_argument=True)
    out: CachePath = option("Folder or URI of the smaller cache.", is_argument=True)
    lead_span: float | LeadSpans = option(
        "Proportion of every trace to keep, from its start; or several with weights, such as "
        "0.375:4,1:1, drawn as a run with this --lead-span draws them.",
        default=1.0,
        above=0,
        at_most=1,
        metavar="SPAN",
        parse=parse_span,
    )
    seed: int | None = option(
        "Seed of the draw: that of the run which is to train on the mixture.",
        default=None,
        at_least=0,
        unset="0",
    )
    top_k: int | None = option(
        "Largest number of entries to keep per token.", default=None, at_least=1, unset="all"
    )

    def __post_init__(self) -> None:
        check_options(self)
        if isinstance(self.lead_span, LeadSpans):
            for length in self.lead_span.lengths:
                check_options(replace(self, lead_span=length, seed=None))
        elif self.seed is not None:
            raise ValueError(
                f"--seed: nothing is drawn for the single --lead-span {self.lead_span:g}; leave it "
                "out, or give several with weights"
            )


def truncate_cache(
    cache: Cache,
    out: CachePath,
    *,
    lead_span: float | LeadSpans = 1.0,
    seed: int = 0,
    top_k: int | None = None,
    on_trace: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Write the first part of every trace as a cache of its own, and seal it.

    A run that was stopped can be resumed. Memory: one shard's traces.

    Args:
        cache: Cache to make smaller; each trace that counts is used once.
        out: The new cache's folder or URI.
        lead_span: Proportion of every trace that the new cache keeps; of a mixture, each trace's
            is the one that a run on all traces of `cache` draws.
        seed: Seed of that run.
        top_k: Largest number of entries to keep per token, besides the token itself.
        on_trace: Called after every trace, with their number so far and in all.

    Raises:
        CacheMismatchError: If the cache holds less than that, or `out` holds something else.
    """
    top_k = min(top_k or cache.header.top_k, cache.header.top_k)
    keep = _kept(cache, lead_span, seed)
    if isinstance(lead_span, LeadSpans):
        largest, drawn = lead_span.lengths[-1], {"spans": str(lead_span), "seed": seed}
    else:
        largest, drawn = lead_span, None
    header = replace(cache.header, top_k=top_k, max_lead_span=largest, lead_spans=drawn)
    origin = {"truncated_from": cache.fingerprint}
    with CacheWriter(out, header, config={**cache.manifest.config, **origin}) as writer:
        if writer.manifest.config.get("truncated_from") != cache.fingerprint:
            raise CacheMismatchError(
                f"{writer.where}: holds a part of another cache; use another folder"
            )
        if not writer.sealed:
            for shard, rows in rows_by_shard(cache.traces).items():
                first = cache.catalog.index(shard, 0)
                _copy_shard(cache, shard, {row: int(keep[first + row]) for row in rows}, writer)
                on_trace(len(writer.finished()), len(cache))
            if cache.manifest.noise is not None:  # the same rows, of the same engine
                writer.keep_noise(cache.manifest.noise)
            writer.finish()
    return seal_cache(out, known=writer.finished())


def _kept(cache: Cache, lead_span: float | LeadSpans, seed: int) -> NDArray[np.int64]:
    """[rows of the catalogue] Number of tokens to keep of every trace."""
    catalog = cache.catalog
    n_total, held = catalog.numbers("n_total"), catalog.num_held
    if isinstance(lead_span, LeadSpans):
        choice = np.zeros(len(n_total), np.int64)
        choice[catalog.counted] = drawn_choice(catalog, cache.traces, lead_span, seed)
        lengths = [lead_span_lengths(n_total, length) for length in lead_span.lengths]
        keep = np.choose(choice, lengths)
    else:
        keep = lead_span_lengths(n_total, lead_span)
    lacking = np.flatnonzero(keep > held)
    if len(lacking):
        there, asked = (int(tokens[lacking[0]]) for tokens in (held, keep))
        raise CacheMismatchError(
            f"{cache.path}: expected at most what it holds, {cache.header.held_part}: of trace "
            f"{catalog.info(int(lacking[0])).trace_id!r} that is {there:,} tokens, and {asked:,} "
            f"were asked for with {lead_span}. Truncate the cache that it was made from"
        )
    return keep


def _copy_shard(cache: Cache, shard: int, keep: dict[int, int], writer: CacheWriter) -> None:
    infos = cache.shards[shard].traces
    missing = {row: n for row, n in keep.items() if infos[row].trace_id not in writer.finished()}
    policy = KeepPolicy(writer.header.top_k, 1.0)  # no mass cut: all kept entries stay
    for row, trace in cache.read(shard, missing).items():
        cut = narrowed(trace, policy) if policy.top_k < cache.header.top_k else trace
        writer.append(
            FinishedTrace(
                cut,
                infos[row].source_hash,
                num_clamped_tails=int(is_clamped_tail(cut.tail_logit)[cut.k > 0].sum()),
                num_clamped_logits=int((cut.top_logits == LOGIT_GRID[-1]).sum()),
                messages=cache.messages(infos[row].trace_id),
            )
        )
