"""`cache-teacher view`: traces of a cache as a page, token by token."""

from teacher_cache.format import Cache
from teacher_cache.format.files import publish
from teacher_cache.pages.choice import NUM_SHOWN, ViewConfig, choose
from teacher_cache.pages.traces import ShownTrace, trace_page
from teacher_cache.sources.tokenizer import TeacherTokenizer


def write_view(config: ViewConfig, cache: Cache, tokenizer: TeacherTokenizer | None) -> int:
    """Write the page; returns its size in bytes.

    Args:
        config: The options.
        cache: The cache, opened.
        tokenizer: The teacher's; without one, ids are shown instead of text.

    Raises:
        CacheError: If a trace is not there, or a shard is damaged.
        ValueError: If the cache holds no trace.
    """
    chosen = choose(cache, config.trace, config.sample or NUM_SHOWN)

    def text_of(token_id: int) -> str:
        return f" {token_id}" if tokenizer is None else tokenizer.decode([token_id])

    page = trace_page(
        cache, [ShownTrace(trace) for trace in chosen.traces], text_of, chosen=chosen.words
    )
    publish(config.out, page)
    return len(page)
