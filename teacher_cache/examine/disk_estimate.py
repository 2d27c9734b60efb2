"""Disk that a whole capture needs, estimated from the traces of a trial."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from teacher_cache.format import Cache, CacheHeader, Trace
from teacher_cache.format.writing.shard import encode_shard
from teacher_cache.format.writing.writer import SHARD_BYTES

MIN_TRACES = 30  # ten traces gave 43.8 bytes per token, the truth was 14.2
_MOST_TRACES = 400  # traces written again


@dataclass(frozen=True)
class DiskEstimate:
    """Bytes per shard and per token.

    A shard has its own dictionaries, schema and band headers: most of a small trial,
    but negligible in a full shard. So bytes are linear in tokens with an offset, not a ratio.

    Attributes:
        shard_bytes: Bytes of every shard, whatever it holds.
        token_bytes: Further bytes of every token.
        token_error_bytes: Deviation of the trial's two halves from their mean.
    """

    shard_bytes: float
    token_bytes: float
    token_error_bytes: float

    def of(self, num_tokens: float) -> float:
        """Bytes of this many tokens in full shards."""
        growing_bytes = self.token_bytes * num_tokens
        return growing_bytes + math.ceil(growing_bytes / SHARD_BYTES) * self.shard_bytes


def estimate_disk(cache: Cache) -> DiskEstimate | None:
    """Measure by writing the trial's traces again: all of them, and each half.

    Returns:
        The estimate; None for fewer than MIN_TRACES.

    Raises:
        CacheError: If they cannot be read.
    """
    infos = cache.shards[0].traces[:_MOST_TRACES] if cache.shards else ()
    if len(infos) < MIN_TRACES:
        return None
    traces = list(cache.read(0, {r: cache.num_held(i) for r, i in enumerate(infos)}).values())
    middle = len(traces) // 2
    whole = _size(traces, cache.header)
    halves = [_size(part, cache.header) for part in (traces[:middle], traces[middle:])]
    slopes = [
        max(0.0, (whole[1] - num_bytes) / (whole[0] - num_tokens))
        for num_tokens, num_bytes in halves
    ]
    token_bytes = sum(slopes) / 2
    records = sum(len(commit.to_bytes()) for commit in cache.shards)
    record_bytes = records / sum(commit.num_tokens for commit in cache.shards)
    return DiskEstimate(
        shard_bytes=max(0.0, whole[1] - token_bytes * whole[0]),
        token_bytes=token_bytes + record_bytes,
        token_error_bytes=abs(slopes[0] - slopes[1]) / 2,
    )


def _size(traces: Sequence[Trace], header: CacheHeader) -> tuple[int, int]:
    """Number of tokens in some traces, and the bytes of a shard of them."""
    num_tokens = sum(len(trace.token_ids) for trace in traces)
    return num_tokens, len(encode_shard(traces, header).data)
