"""`cache-teacher truncate`: a smaller cache with the first part of every trace of another.

Tokens and entries are those of the full cache, split into new bands without a new choice. Logits
of a cache with another grid are rounded to this version's.
"""

from dataclasses import dataclass, replace

from teacher_cache.format import (
    LOGIT_GRID,
    Cache,
    CacheMismatchError,
    CachePath,
    CacheWriter,
    FinishedTrace,
    KeepPolicy,
    Manifest,
    narrowed,
    rows_by_shard,
    seal_cache,
)
from teacher_cache.format.codec import is_clamped_tail
from teacher_cache.terminal.option import check_options, option


def _lead_span(text: str) -> float:
    """Read a proportion; say why a mixture of them is none."""
    try:
        return float(text)
    except ValueError:
        if ":" not in text and "," not in text:
            raise ValueError(f"expected a proportion of every trace, got {text!r}") from None
        raise ValueError(
            f"expected one proportion, got the mixture {text!r}: a truncated cache holds the same "
            "part of every trace, while a mixture is drawn from the seed of a run. Leave the cache "
            "whole and train with this --lead-span: a run reads only what its spans need"
        ) from None


@dataclass(frozen=True, kw_only=True)
class TruncateConfig:
    """`cache-teacher truncate`."""

    cache: CachePath = option("Folder or URI of the cache.", is_argument=True)
    out: CachePath = option("Folder or URI of the smaller cache.", is_argument=True)
    lead_span: float = option(
        "Proportion of every trace to keep, from its start.",
        default=1.0,
        above=0,
        at_most=1,
        parse=_lead_span,
    )
    top_k: int | None = option(
        "Largest number of entries to keep per token.", default=None, at_least=1, unset="all"
    )

    def __post_init__(self) -> None:
        check_options(self)


def truncate_cache(
    cache: Cache, out: CachePath, *, lead_span: float = 1.0, top_k: int | None = None
) -> Manifest:
    """Write the first `lead_span` of every trace as a cache of its own, and seal it.

    A run that was stopped can be resumed. Memory: one shard's traces.

    Args:
        cache: Cache to make smaller; each trace that counts is used once.
        out: The new cache's folder or URI.
        lead_span: Proportion of every trace that the new cache keeps.
        top_k: Largest number of entries to keep per token, besides the token itself.

    Raises:
        CacheMismatchError: If the cache holds less than that, or `out` holds something else.
    """
    held = cache.header.max_lead_span
    if not 0 < lead_span <= held:
        raise CacheMismatchError(
            f"{cache.path}: expected a lead span in (0, {held:g}], the part of every trace that "
            f"the cache holds, got {lead_span:g}"
        )
    top_k = min(top_k or cache.header.top_k, cache.header.top_k)
    header = replace(cache.header, max_lead_span=lead_span, top_k=top_k)
    origin = {"truncated_from": cache.fingerprint}
    with CacheWriter(out, header, config={**cache.manifest.config, **origin}) as writer:
        if writer.manifest.config.get("truncated_from") != cache.fingerprint:
            raise CacheMismatchError(
                f"{writer.where}: holds a part of another cache; use another folder"
            )
        if not writer.sealed:
            for shard, rows in rows_by_shard(cache.traces).items():
                _copy_shard(cache, shard, rows, writer)
            if cache.manifest.noise is not None:  # the same rows, of the same engine
                writer.keep_noise(cache.manifest.noise)
            writer.finish()
    return seal_cache(out, known=writer.finished())


def _copy_shard(cache: Cache, shard: int, rows: list[int], writer: CacheWriter) -> None:
    infos = cache.shards[shard].traces
    missing = [row for row in rows if infos[row].trace_id not in writer.finished()]
    keep = {row: writer.header.num_held(infos[row].n_total) for row in missing}
    policy = KeepPolicy(writer.header.top_k, 1.0)  # no mass cut: all kept entries stay
    for row, trace in cache.read(shard, keep).items():
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
