"""What a lead span costs and saves, counted on a cache's commit records; nothing is read."""

from student_train.data.tokens import TokenSelection
from student_train.data.traces import CacheTraces
from teacher_cache.format import num_bands_needed


def span_costs(source: CacheTraces, selection: TokenSelection) -> dict[str, float]:
    """Figures of one epoch, and of the cache that it takes.

    Returns:
        num_positions: Tokens that the student sees, labelled or not.
        cot_share: Share of the chain of thought's tokens that are labels.
        trace_share: Share of all tokens that are labels.
        cache_bytes: Size of a cache that holds just what is read: the shards' leading bands.
        tokens_saved: Tokens of the traces behind the last one needed; a teacher that stopped
            there would not have generated them.
        num_captured: Tokens of all traces of the cache, those not trained on too.
    """
    cache, infos = source.cache, source.train_infos()
    labels = num_read = 0
    for info in infos:
        ranges = selection.ranges(info)
        labels += sum(end - first for first, end in ranges)
        num_read += selection.num_read(info)
    num_tokens = sum(info.n_total for info in infos)
    cache_bytes = 0
    for shard in cache.shards:
        spans = ((cache.num_held(info), selection.num_read(info)) for info in shard.traces)
        cache_bytes += shard.prefix_bytes(num_bands_needed(spans, len(shard.blocks)))
    return {
        "num_positions": num_read,
        "cot_share": selection.cot_share(infos),
        "trace_share": labels / num_tokens,
        "cache_bytes": cache_bytes,
        "tokens_saved": num_tokens - num_read,
        "num_captured": sum(info.n_total for info in cache.infos),
    }
