"""Costs and savings of a lead span, counted on a cache's catalogue; no shard is read."""

from student_train.data.draw import DrawnSpans, SpanFigures


def span_costs(drawn: DrawnSpans) -> dict[str, float]:
    """Figures of one epoch, and of the cache that it needs.

    Returns:
        num_positions: Tokens that the student sees, labelled or not.
        mean_lead_span: Share of all tokens that lie inside the lead spans.
        whole_trace_share: Share of the traces that are not cut.
        cot_share: Share of the chain of thought's tokens that are labels.
        trace_share: Share of all tokens that are labels.
        cache_bytes: Size of a cache that holds just what is read: the shards' leading bands.
        tokens_saved: Tokens of the traces behind the last one needed; a teacher that stopped
            there would not have generated them.
        num_captured: Tokens of all traces of the cache, those not trained on too.
    """
    cache, figures = drawn.source.cache, SpanFigures.of([drawn])
    num_read, num_tokens = int(drawn.num_read.sum()), int(drawn.bounds.n_total.sum())
    return {
        "num_positions": num_read,
        "mean_lead_span": figures.mean_lead_span,
        "whole_trace_share": figures.whole_trace_share,
        "cot_share": figures.cot_share,
        "trace_share": int(drawn.num_labels.sum()) / num_tokens,
        "cache_bytes": drawn.bytes_read,
        "tokens_saved": num_tokens - num_read,
        "num_captured": int(cache.catalog.numbers("n_total")[cache.catalog.counted].sum()),
    }
