"""Says how many traces at a time an engine's KV cache holds, once their length is known.

vLLM starts as many requests as `max_num_seqs` and its blocks allow. When blocks run out, the one
that began last gives up its own and is computed again later, all its tokens in one step. So where
the number of steps sets the time, a number that is too high costs little. To start no more than the
cache holds as whole traces takes more steps, because those in flight are half written on average
(`tools/bench_kv_room.py`). A number that is too low leaves room unused, which nothing shows: that
is what is said here.
"""

import logging
from typing import Any

logger = logging.getLogger(__name__)

_WORTHWHILE = 1.5  # times `max_num_seqs`


class KvRoom:
    """Room for traces in the KV cache of an engine that draws tokens."""

    def __init__(self, vllm_config: Any) -> None:  # noqa: ANN401 (vLLM is untyped here)
        """Take the room of a running engine, in tokens."""
        cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
        # Groups of layers may hold a token each: newer versions count that.
        counted = getattr(cache, "kv_cache_size_tokens", None)
        self.num_tokens = int(counted or (cache.num_gpu_blocks or 0) * cache.block_size)
        self._max_num_seqs = int(scheduler.max_num_seqs)
        self._most_useful = int(scheduler.max_num_batched_tokens)  # vLLM refuses more
        self._num_traces = self._num_seen_tokens = 0

    def note(self, num_tokens: int) -> None:
        """Count a finished trace; after `2 * max_num_seqs` of them say how many the cache holds.

        The first `max_num_seqs` to finish are the short ones of those that began together.
        """
        self._num_traces += 1
        if self._num_traces <= self._max_num_seqs:
            return
        self._num_seen_tokens += num_tokens
        if self._num_traces != 2 * self._max_num_seqs:
            return
        mean = self._num_seen_tokens / self._max_num_seqs
        best = min(int(self.num_tokens / mean), self._most_useful)
        if best >= _WORTHWHILE * self._max_num_seqs:
            logger.info(
                "the engine's KV cache has room for %d traces of %d tokens, the mean so far, and "
                "%d run at once: --engine-arg max_num_seqs=%d may be faster",
                best, mean, self._max_num_seqs, best,
            )  # fmt: skip
