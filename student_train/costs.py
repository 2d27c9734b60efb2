"""What a lead span costs and saves, counted on a cache's commit records; nothing is read."""

from typing import Any

from student_train.selection import TokenSelection
from teacher_cache.format import Cache, num_bands_needed


def span_costs(cache: Cache, selection: TokenSelection) -> dict[str, Any]:
    """Figures of one pass over a cache.

    Returns:
        num_positions: Tokens that the student sees, labelled or not.
        cot_share: Share of the chain of thought's tokens that are labels.
        trace_share: Share of all tokens that are labels.
        cache_bytes: Size of a cache that holds just what is read: the shards' leading bands.
        tokens_saved: Tokens of the traces behind the last one needed; a teacher that stopped
            there would not have generated them.
        num_tokens: Tokens of the whole traces.
    """
    infos = [cache.shards[shard].traces[row] for shard, row in cache.traces]
    labels = in_cot = cot = num_read = 0
    for info in infos:
        ranges = selection.ranges(info.n_total, info.cot_start, info.answer_start)
        labels += sum(end - first for first, end in ranges)
        in_cot += sum(
            max(0, min(end, info.answer_start) - max(first, info.cot_start))
            for first, end in ranges
        )
        cot += info.answer_start - info.cot_start
        num_read += selection.num_read(info)
    num_tokens = sum(info.n_total for info in infos)
    cache_bytes = 0
    for shard in cache.shards:
        spans = ((cache.num_held(info), selection.num_read(info)) for info in shard.traces)
        cache_bytes += shard.prefix_bytes(num_bands_needed(spans, len(shard.blocks)))
    return {
        "num_positions": num_read,
        "cot_share": in_cot / cot if cot else 0.0,
        "trace_share": labels / num_tokens,
        "cache_bytes": cache_bytes,
        "tokens_saved": num_tokens - num_read,
        "num_tokens": num_tokens,
    }
