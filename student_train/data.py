"""What a run trains on: the traces of its caches, without those that are held out."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from teacher_cache.format import Cache, CachePath, KeepPolicy, Trace, TraceInfo, open_cache

Place = tuple[int, int]  # (shard, row) of a trace in its cache


@dataclass(frozen=True)
class Source:
    """The traces of one cache that a run uses, in the cache's order."""

    cache: Cache
    view: KeepPolicy  # how many entries of a token are read
    train: tuple[Place, ...]
    heldout: tuple[Place, ...]

    def train_infos(self) -> list[TraceInfo]:
        """What is known of the traces trained on without reading a shard."""
        return [self.cache.shards[shard].traces[row] for shard, row in self.train]


@dataclass(frozen=True)
class TrainingData:
    """The traces of one or more caches. Its caches are read by one thread at a time."""

    sources: tuple[Source, ...]

    @property
    def fingerprint(self) -> str:
        """Of every cache's content."""
        return ", ".join(source.cache.fingerprint for source in self.sources)

    @property
    def num_traces(self) -> int:
        """Traces of an epoch."""
        return sum(len(source.train) for source in self.sources)

    @property
    def num_heldout(self) -> int:
        """Traces that are never trained on."""
        return sum(len(source.heldout) for source in self.sources)

    @property
    def terminal_token_ids(self) -> tuple[int, ...]:
        """What ends the traces of any cache."""
        found = (name for s in self.sources for name in s.cache.header.terminal_token_ids)
        return tuple(dict.fromkeys(found))

    @property
    def bytes_read(self) -> int:
        """From shards, for training."""
        return sum(source.cache.bytes_read for source in self.sources)

    def locate(self, shard: int) -> tuple[Source, int]:
        """The source of a shard, and its index in that cache; shards are counted through."""
        for source in self.sources:
            if shard < len(source.cache.shards):
                return source, shard
            shard -= len(source.cache.shards)
        raise IndexError("no such shard")

    def info(self, shard: int, row: int) -> TraceInfo:
        """What is known of a trace without reading its shard."""
        source, shard_of_cache = self.locate(shard)
        return source.cache.shards[shard_of_cache].traces[row]

    def train_places(self) -> list[Place]:
        """Traces of an epoch; shards are counted through all caches."""
        places: list[Place] = []
        first = 0
        for source in self.sources:
            places += [(first + shard, row) for shard, row in source.train]
            first += len(source.cache.shards)
        return places

    def heldout_traces(
        self, *, rank: int = 0, num_ranks: int = 1, limit: int | None = None
    ) -> Iterator[Trace]:
        """Read the held-out traces, whole (as far as their cache holds them), shard by shard.

        Always the same traces in the same order. May run while a stream over the same data does;
        what it reads does not count in `bytes_read`. A trace costs its whole shard, so keep them
        in memory where they are used often.

        Args:
            rank: Whose part is read; ranks take whole shards, some perhaps none.
            num_ranks: How many share the traces.
            limit: Stop after so many traces, of all ranks together.

        Raises:
            CacheFormatError: If a shard is missing or damaged.
        """
        places = [(i, *place) for i, source in enumerate(self.sources) for place in source.heldout]
        rows_of_shard: dict[tuple[int, int], list[int]] = {}
        for number, shard, row in places[:limit]:
            rows_of_shard.setdefault((number, shard), []).append(row)
        for (number, shard), rows in list(rows_of_shard.items())[rank::num_ranks]:
            source = self.sources[number]
            cache = replace(source.cache, bytes_read=0)  # counts for itself
            infos = cache.shards[shard].traces
            keep = {row: cache.num_held(infos[row]) for row in rows}
            yield from cache.read(shard, keep, source.view).values()


def open_data(
    caches: Sequence[CachePath],
    *,
    heldout_share: float = 0.0,
    top_k: int | None = None,
    mass: float | None = None,
    allow_unsealed: bool = False,
) -> TrainingData:
    """Open caches and choose their traces; no shard is read.

    Args:
        caches: Folders or URIs.
        heldout_share: Proportion of the traces that is not trained on; see `is_heldout`.
        top_k: As of `Cache.view`, for every cache.
        mass: As of `Cache.view`.
        allow_unsealed: As of `open_cache`.

    Raises:
        CacheError: If a cache cannot be read, or was captured with fewer entries.
        ValueError: If no trace is left to train on, or none is held out where some should be.
    """
    sources = []
    for path in caches:
        cache = open_cache(path, allow_unsealed=allow_unsealed)
        if not cache.traces:
            raise ValueError(f"{cache.path}: the cache holds no trace")
        has_samples = _has_samples(cache)
        train: list[Place] = []
        heldout: list[Place] = []
        for shard, row in cache.traces:
            name = cache.shards[shard].traces[row].trace_id
            is_out = is_heldout(name, heldout_share, has_sample_number=has_samples)
            (heldout if is_out else train).append((shard, row))
        view = cache.view(top_k=top_k, mass=mass)
        sources.append(Source(cache, view, tuple(train), tuple(heldout)))
    data = TrainingData(tuple(sources))
    num_all = data.num_traces + data.num_heldout
    if not data.num_traces:
        raise ValueError(
            f"heldout-share {heldout_share:g} leaves none of {num_all:,} traces to train on"
        )
    if heldout_share and not data.num_heldout:
        raise ValueError(
            f"heldout-share {heldout_share:g} holds out none of {num_all:,} traces; raise it"
        )
    return data


def is_heldout(trace_id: str, share: float, *, has_sample_number: bool = False) -> bool:
    """Whether a trace is held out: a property of its id alone, in every cache, run and epoch.

    Args:
        trace_id: Of the trace.
        share: Proportion of ids that are held out.
        has_sample_number: The id ends in `#` and a number, which does not count: all samples of
            a prompt stand on one side.
    """
    name = re.sub(r"#\d+\Z", "", trace_id) if has_sample_number else trace_id
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _has_samples(cache: Cache) -> bool:
    count = cache.manifest.config.get("samples_per_prompt", 1)
    return isinstance(count, int) and count > 1
