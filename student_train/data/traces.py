"""The traces that a run trains on: those chosen from its caches, without the held-out ones."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from student_train.data.mixture import shares_of_epoch
from student_train.data.trace_fields import TraceFields
from student_train.data.where import BUILT_IN, Where
from teacher_cache.format import (
    Cache,
    CachePath,
    KeepPolicy,
    Places,
    PrefixCache,
    ShardList,
    Trace,
    TraceInfo,
    open_cache,
)

_SAMPLE_ID = re.compile(r"(.*)#\d+\Z", re.DOTALL)

Place = tuple[int, int]  # (shard, row) of a trace in its cache


@dataclass(frozen=True)
class CacheTraces:
    """The traces of one cache that a run uses, in the cache's order."""

    cache: Cache
    view: KeepPolicy  # how many entries of a token are read
    train: Places
    heldout: Places
    num_left_out: int  # by `where`

    def train_infos(self) -> Sequence[TraceInfo]:
        """Facts about the traces trained on; no shard is read."""
        return self.cache.infos_of(self.train)


@dataclass(frozen=True)
class TrainingData:
    """The traces of one or more caches. Its caches are read by one thread at a time."""

    sources: tuple[CacheTraces, ...]
    weights: tuple[float, ...] | None = None  # of the sources: see mixture.py
    fields_sha256: str | None = None  # of the file whose fields chose the traces

    @property
    def fingerprint(self) -> str:
        """Fingerprint of every cache's content and of the file that helped choose traces."""
        parts = [source.cache.fingerprint for source in self.sources]
        if self.fields_sha256 is not None:
            parts.append(f"trace fields {self.fields_sha256}")
        return ", ".join(parts)

    @property
    def num_traces(self) -> int:
        """Number of traces per epoch, however they are mixed."""
        return sum(len(source.train) for source in self.sources)

    @property
    def shares_of_epoch(self) -> list[int]:
        """Number of an epoch's traces from each source."""
        sizes = [len(source.train) for source in self.sources]
        return sizes if self.weights is None else shares_of_epoch(sizes, self.weights)

    @property
    def has_own_traces(self) -> bool:
        """Whether some cache holds rollouts of a student."""
        return any(source.cache.header.rollout is not None for source in self.sources)

    @property
    def summary(self) -> str:
        """One line on the traces that are trained on and those that are not."""
        parts = [f"{self.num_traces:,} traces per epoch"]
        if len(self.sources) > 1:
            shares = self.shares_of_epoch
            parts[0] += f" ({' + '.join(f'{share:,}' for share in shares)})"
        num_left_out = sum(source.num_left_out for source in self.sources)
        if num_left_out:
            parts.append(f"{num_left_out:,} left out by --where")
        if self.num_heldout:
            parts.append(f"{self.num_heldout:,} held out")
        return ", ".join(parts)

    @property
    def num_heldout(self) -> int:
        """Number of traces that are never trained on."""
        return sum(len(source.heldout) for source in self.sources)

    def heldout_infos(self) -> list[TraceInfo]:
        """Facts about the held-out traces; no shard is read."""
        return [info for s in self.sources for info in s.cache.infos_of(s.heldout)]

    @property
    def snapshots(self) -> list[ShardList | None]:
        """`Cache.snapshot` of every cache: with these the same traces are opened again."""
        return [source.cache.snapshot for source in self.sources]

    @property
    def terminal_token_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end traces, over all caches."""
        found = (name for s in self.sources for name in s.cache.header.terminal_token_ids)
        return tuple(dict.fromkeys(found))

    @property
    def bytes_read(self) -> int:
        """Bytes read from shards for training."""
        return sum(source.cache.bytes_read for source in self.sources)

    @property
    def num_shards(self) -> int:
        """Number of shards of all caches."""
        return sum(len(source.cache.shards) for source in self.sources)

    def locate(self, shard: int) -> tuple[int, int]:
        """The source of a shard, counted through all caches, and its index in that cache."""
        for number, source in enumerate(self.sources):
            if shard < len(source.cache.shards):
                return number, shard
            shard -= len(source.cache.shards)
        raise IndexError("no such shard")

    def info(self, shard: int, row: int) -> TraceInfo:
        """Facts about a trace; its shard is not read."""
        number, shard_of_cache = self.locate(shard)
        catalog = self.sources[number].cache.catalog
        return catalog.info(catalog.index(shard_of_cache, row))

    def values_at(
        self,
        values: Sequence[NDArray[np.int64]],
        shard: NDArray[np.int64],
        row: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """[n] Values of n traces, by their shards and rows.

        Args:
            values: For each source, [rows of its catalogue].
            shard: [n] each trace's shard, counted through all caches.
            row: [n] its row there.
        """
        first_rows, first = [], 0
        for source in self.sources:
            first_rows.append(first + source.cache.catalog.first_row[:-1])
            first += source.cache.catalog.num_rows
        found: NDArray[np.int64] = np.concatenate(values)[np.concatenate(first_rows)[shard] + row]
        return found

    def heldout_traces(self) -> Iterator[Trace]:
        """Read the held-out traces, whole and with all entries that their cache holds.

        A yardstick that no option moves: always the same traces in the same order. This may run
        during a stream over the same data; its reads do not count in `bytes_read`. A trace costs
        its whole shard, so keep the traces in memory if you use them often.

        Raises:
            CacheFormatError: If a shard is missing or damaged.
            ConnectionError: If a shard lies elsewhere and cannot be reached.
        """
        for source in self.sources:
            cache = replace(source.cache, bytes_read=0)  # with a count of its own
            yield from cache.read_held(source.heldout)


def open_data(
    caches: Sequence[CachePath],
    *,
    weights: Sequence[float] | None = None,
    where: str | None = None,
    trace_fields: Path | None = None,
    heldout_share: float = 0.0,
    top_k: int | None = None,
    mass: float | None = None,
    allow_unsealed: bool = False,
    snapshots: Sequence[ShardList | None] | None = None,
    prefix_cache: PrefixCache | None = None,
) -> TrainingData:
    """Open caches and choose their traces; no shard is read.

    Args:
        caches: Folders or URIs.
        weights: Weight of each cache for mixing; None means every trace once per epoch.
        where: Condition on traces, see `Where`; held-out traces fulfil it too.
        trace_fields: JSONL of further fields that `where` can ask for, see `TraceFields`.
        heldout_share: Proportion of the traces that is held out; see `is_heldout`.
        top_k: As in `Cache.view`, for every cache.
        mass: As in `Cache.view`.
        allow_unsealed: As in `open_cache`.
        snapshots: `TrainingData.snapshots` of an earlier opening of these caches.
        prefix_cache: As in `open_cache`.

    Raises:
        CacheError: If a cache cannot be read, or was captured with fewer entries.
        ValueError: If no trace is left to train on, none is held out where some should be, or
            the weights do not fit.
    """
    if snapshots is None or len(snapshots) != len(caches):
        snapshots = [None] * len(caches)
    opened = [
        open_cache(
            path, allow_unsealed=allow_unsealed, snapshot=snapshot, prefix_cache=prefix_cache
        )
        for path, snapshot in zip(caches, snapshots, strict=True)
    ]
    for number, cache in enumerate(opened):
        if not len(cache):
            raise ValueError(f"{cache.path}: the cache holds no trace")
        if cache.fingerprint in {other.fingerprint for other in opened[:number]}:
            raise ValueError(f"{cache.path}: the same cache is named twice; give it a weight")
    condition = None if where is None else Where.parse(where)
    further = None if trace_fields is None else TraceFields.read(trace_fields)
    if condition is not None:
        _check_names(condition, opened, further)
    sources = tuple(
        _choose(cache, condition, further, heldout_share, cache.view(top_k=top_k, mass=mass))
        for cache in opened
    )
    _check_counts(sources, where, heldout_share)
    if weights is not None:
        _check_weights(sources, weights)
    return TrainingData(
        sources,
        None if weights is None else tuple(weights),
        None if further is None else further.sha256,
    )


def _choose(
    cache: Cache,
    where: Where | None,
    further: TraceFields | None,
    heldout_share: float,
    view: KeepPolicy,
) -> CacheTraces:
    chosen = cache.catalog.counted
    if where is not None and further is not None:
        known = (further.added_to(info, cache) for info in cache.infos)
        chosen = chosen[np.fromiter((where.holds(info) for info in known), bool, len(chosen))]
    elif where is not None:
        chosen = chosen[where.holds_for(cache.catalog, chosen)]
    is_out = np.zeros(len(chosen), bool)
    if heldout_share:
        names = _prompt_names(cache)
        ids = cache.catalog.trace_ids(chosen)
        held = (is_heldout(names.get(trace_id, trace_id), heldout_share) for trace_id in ids)
        is_out = np.fromiter(held, bool, len(chosen))
    train, heldout = (Places(cache.catalog, chosen[part]) for part in (~is_out, is_out))
    return CacheTraces(cache, view, train, heldout, len(cache) - len(chosen))


def _check_names(where: Where, caches: Sequence[Cache], further: TraceFields | None) -> None:
    known = {*BUILT_IN, *(() if further is None else further.names)}
    fields: set[str] = set()
    for cache in caches if where.names - known else ():
        fields |= cache.catalog.field_names
    unknown = sorted(where.names - known - fields)
    if unknown:
        raise ValueError(
            f"where: no trace has a field {unknown[0]!r}; known fields: "
            f"{', '.join([*BUILT_IN, *sorted(fields | known - set(BUILT_IN))])}"
        )


def _check_counts(sources: Sequence[CacheTraces], where: str | None, heldout_share: float) -> None:
    for source in sources:
        num_chosen = len(source.train) + len(source.heldout)
        if not num_chosen:
            raise ValueError(
                f"{source.cache.path}: where {where!r} holds for none of "
                f"{source.num_left_out:,} traces"
            )
        if not source.train:
            raise ValueError(
                f"{source.cache.path}: heldout-share {heldout_share:g} leaves none of "
                f"{num_chosen:,} traces to train on"
            )
    if heldout_share and not any(source.heldout for source in sources):
        num_all = sum(len(source.train) for source in sources)
        raise ValueError(
            f"heldout-share {heldout_share:g} holds out none of {num_all:,} traces; raise it"
        )


def _check_weights(sources: Sequence[CacheTraces], weights: Sequence[float]) -> None:
    if len(weights) != len(sources):
        raise ValueError(
            f"cache-weights: expected {len(sources)}, one for every cache, got {len(weights)}"
        )
    shares = shares_of_epoch([len(source.train) for source in sources], weights)
    for source, share in zip(sources, shares, strict=True):
        if not share:
            raise ValueError(
                f"cache-weights: {source.cache.path} gives no trace to an epoch of {sum(shares):,}"
            )


def is_heldout(name: str, share: float) -> bool:
    """Whether a prompt's traces are held out: decided by its name, alike in every run and epoch.

    Args:
        name: The trace's id, without the sample number where it is one of several.
        share: Proportion of names that are held out.
    """
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _prompt_names(cache: Cache) -> dict[str, str]:
    """Map trace ids to their prompt's id, for traces that are one sample of several.

    A capture with several samples says so, and names them `prompt#number`. Where such traces were
    scored again, only the names are left; other ids may end like this too (`gsm8k#17`), but then
    their prompts differ, and so do their numbers of tokens.
    """
    count = cache.manifest.config.get("samples_per_prompt", 1)
    has_samples = isinstance(count, int) and count > 1
    counted = cache.catalog.counted
    starts = cache.catalog.numbers("cot_start")[counted].tolist()
    of_prompt: dict[str, list[tuple[str, int]]] = {}
    for trace_id, cot_start in zip(cache.catalog.trace_ids(counted), starts, strict=True):
        found = _SAMPLE_ID.match(trace_id)
        if found:
            of_prompt.setdefault(found[1], []).append((trace_id, cot_start))
    names: dict[str, str] = {}
    for name, samples in of_prompt.items():
        if has_samples or len({cot_start for _, cot_start in samples}) == 1:
            names.update((trace_id, name) for trace_id, _ in samples)
    return names
