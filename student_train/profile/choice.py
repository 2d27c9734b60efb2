"""Choice of traces that represent a cache: some of several shards, by hash."""

import hashlib

from student_train.data.traces import CacheTraces, Place
from teacher_cache.format import rows_by_shard

MIN_SHARDS = 10  # neighbours in a shard may be alike; every additional shard costs its bytes


def chosen_places(source: CacheTraces, num_traces: int, seed: int) -> list[Place]:
    """Places of `num_traces` traces, or of all, from as few shards as allowed.

    Args:
        source: Traces that a run would be trained on.
        num_traces: Number of traces to choose.
        seed: Seed for the choice; the same seed gives the same traces.
    """
    rows_of_shard = rows_by_shard(source.train)
    catalog = source.cache.catalog
    candidates: list[Place] = []
    for number, shard in enumerate(
        sorted(rows_of_shard, key=lambda shard: _key(seed, catalog.shard_list[shard][0]))
    ):
        if number >= MIN_SHARDS and len(candidates) >= num_traces:
            break
        candidates += [(shard, row) for row in rows_of_shard[shard]]
    candidates.sort(key=lambda place: _key(seed, catalog.info(catalog.index(*place)).trace_id))
    return sorted(candidates[:num_traces])


def _key(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"profile/{seed}/{name}".encode()).digest()
