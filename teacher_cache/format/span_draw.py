"""Draw of a length of a mixture for every trace of a cache, from a seed; reads no shard."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format.catalog import Catalog
from teacher_cache.format.lead_spans import LeadSpans
from teacher_cache.format.reading.places import Places

# Shards for the rarest span: fewer would teach a length on too narrow a part of the data.
MIN_SHARDS_PER_SPAN = 4


def deals_shards(traces: Places, lengths: LeadSpans) -> bool:
    """Whether there are shards enough to give all traces of a shard the same length."""
    return len(np.unique(traces.shard)) * min(lengths.shares) >= MIN_SHARDS_PER_SPAN


def drawn_choice(
    catalog: Catalog, traces: Places, lengths: LeadSpans, seed: int
) -> NDArray[np.int16]:
    """[n] Index into the lengths for each of n traces.

    Each length gets its share of the tokens to within one trace, or to within one shard where
    shards are dealt.

    Args:
        catalog: Catalogue of the cache.
        traces: The traces; others of the cache do not enter the draw.
        lengths: The mixture.
        seed: Seed of the draw.
    """
    num_tokens = catalog.numbers("n_total")[traces.catalog_rows]
    if not deals_shards(traces, lengths):
        names = catalog.trace_ids(traces.catalog_rows)
        return np.array(_dealt(names, num_tokens.tolist(), lengths, seed), np.int16)
    shards, shard_of_trace = np.unique(traces.shard, return_inverse=True)
    names = [catalog.shard_list[shard][0] for shard in shards.tolist()]
    of_shard = np.bincount(shard_of_trace, weights=num_tokens).astype(np.int64)
    return np.array(_dealt(names, of_shard.tolist(), lengths, seed), np.int16)[shard_of_trace]


def _dealt(
    names: Sequence[str], num_tokens: Sequence[int], lengths: LeadSpans, seed: int
) -> list[int]:
    """Index of each one's length: where its middle lies among all tokens, in hash order."""
    keys = [hashlib.sha256(f"lead-span/{seed}/{name}".encode()).digest() for name in names]
    order = sorted(range(len(names)), key=keys.__getitem__)
    total, before = sum(num_tokens), 0
    index = [0] * len(names)
    for place in order:
        index[place] = lengths.index_at((before + num_tokens[place] / 2) / total)
        before += num_tokens[place]
    return index
