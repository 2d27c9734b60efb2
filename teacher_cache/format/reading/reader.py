"""Reading a cache: commit records first, then only the needed prefix of each shard.

Every block read is checked against its crc32, and every value against the format, before
anything is handed out.
"""

import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from teacher_cache.format.bands import num_bands_needed
from teacher_cache.format.catalog import Catalog
from teacher_cache.format.codec import KeepPolicy
from teacher_cache.format.commit import ShardCommit, TraceInfo
from teacher_cache.format.errors import (
    CacheFormatError,
    CacheMismatchError,
    TraceNotFoundError,
    repair_advice,
)
from teacher_cache.format.header import CacheHeader
from teacher_cache.format.manifest import SHARD_FOLDER, Manifest, ShardList, shards_fingerprint
from teacher_cache.format.reading.catalog_file import open_catalog
from teacher_cache.format.reading.decode import assemble, decode_bands
from teacher_cache.format.reading.messages import read_messages
from teacher_cache.format.reading.places import (
    Infos,
    Place,
    Places,
    Shards,
    alike_ids,
    rows_by_shard,
)
from teacher_cache.format.reading.prefix_cache import PrefixCache
from teacher_cache.format.reading.view import narrowed
from teacher_cache.format.records import (
    committed_names,
    require_manifest,
    shard_file,
)
from teacher_cache.format.store import CachePath, Store, open_store
from teacher_cache.format.trace import Trace

logger = logging.getLogger(__name__)

_MOST_LISTED_SHARDS = 450  # an object store lists 1,000 files a request, two of each shard


@dataclass(repr=False)
class Cache:
    """An open cache: an immutable snapshot of its commit records, and access to its shards.

    `len(cache)` counts its traces, `cache["some-id"]` reads one, `for trace in cache` reads all,
    as far as the cache holds them. `read` takes leading tokens of some traces of one shard.
    """

    path: str
    manifest: Manifest
    catalog: Catalog  # of its traces and shards
    fingerprint: str  # identifies the shards' content
    store: Store
    prefix_cache: PrefixCache | None = None
    bytes_read: int = 0  # read from shards by this object
    bytes_fetched: int = 0  # of these, those not found in the prefix cache
    _messages: tuple[str, dict[str, Any]] | None = field(default=None, repr=False)  # one shard's

    def __len__(self) -> int:
        return len(self.catalog.counted)

    def __repr__(self) -> str:
        num_tokens = int(self.catalog.num_held[self.catalog.counted].sum())
        state = "sealed" if self.sealed else "not sealed"
        return (
            f"Cache({self.path!r}: {len(self):,} traces, {num_tokens:,} tokens, "
            f"{len(self.shards):,} shards, teacher {self.header.teacher!r}, {state})"
        )

    def __iter__(self) -> Iterator[Trace]:
        """Every trace once, shard by shard; raises as `read`. Memory: the traces of one shard."""
        return self.read_held(self.traces)

    def __contains__(self, trace_id: str) -> bool:
        """Whether there is a trace with this id, without reading shards.

        Raises:
            TypeError: If `trace_id` is not a string.
        """
        self._require_text(trace_id)
        return trace_id in self._number_of_id

    def __getitem__(self, trace_id: str) -> Trace:
        """Read one trace; each access reads its shard again.

        Raises:
            TypeError: If `trace_id` is not a string.
            TraceNotFoundError: If no trace has this id; also a KeyError.
            CacheFormatError: If its shard is missing or damaged.
        """
        self._require_text(trace_id)
        return next(self.read_held([self.place(trace_id)]))

    def _require_text(self, trace_id: object) -> None:
        if not isinstance(trace_id, str):
            raise TypeError(
                f"{self.path}: expected the id of a trace, such as "
                f"{next(iter(self._number_of_id), 'some-id')!r}, got {trace_id!r}; `for trace in "
                "cache` gives all traces"
            )

    def place(self, trace_id: str) -> Place:
        """Place (shard, row) of a trace, as in `traces`.

        Raises:
            TraceNotFoundError: If no trace has this id.
        """
        if trace_id not in self._number_of_id:
            raise TraceNotFoundError(
                f"{self.path}: no trace {trace_id!r} among {len(self):,}"
                f"{alike_ids(trace_id, self._number_of_id)}"
            )
        return self.traces[self._number_of_id[trace_id]]

    @cached_property
    def shards(self) -> Sequence[ShardCommit]:
        """Commit records, by name; each is made when it is asked for."""
        return Shards(self.catalog)

    @cached_property
    def traces(self) -> Places:
        """(shard, row) of every trace, each counted once."""
        return Places(self.catalog, self.catalog.counted)

    @cached_property
    def infos(self) -> Sequence[TraceInfo]:
        """Facts about every trace that need no shard, in the order of `traces`."""
        return self.infos_of(self.traces)

    def infos_of(self, places: Places) -> Sequence[TraceInfo]:
        """Facts about some traces, in the order of their places."""
        return Infos(self.catalog, places.catalog_rows)

    @cached_property
    def _number_of_id(self) -> Mapping[str, int]:
        ids = self.catalog.trace_ids(self.catalog.counted)
        return {trace_id: number for number, trace_id in enumerate(ids)}

    @property
    def header(self) -> CacheHeader:
        """Provenance and policy of the cache."""
        return self.manifest.header

    @property
    def sealed(self) -> bool:
        """Whether the capture is complete."""
        return self.manifest.seal is not None

    @property
    def snapshot(self) -> ShardList | None:
        """The shards of this snapshot, if it is not all of a complete capture."""
        if self.manifest.seal is not None and self.manifest.seal.fingerprint == self.fingerprint:
            return None
        return self.catalog.shard_list

    def num_held(self, trace: TraceInfo) -> int:
        """Number of leading tokens of a trace that can be read: all, unless truncated."""
        return self.header.num_held(trace.n_total, trace.n_held)

    def view(self, *, top_k: int | None = None, mass: float | None = None) -> KeepPolicy:
        """Policy with which `read` gives fewer entries than were captured.

        Args:
            top_k: Most entries per token, besides the token itself; as captured if None.
            mass: Probability that the fewest possible entries reach; as captured if None.

        Raises:
            CacheMismatchError: If the capture kept less than that.
            ValueError: If `top_k` is below 1 or `mass` not in (0, 1].
        """
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {top_k}")
        if mass is not None and not 0.0 < mass <= 1.0:
            raise ValueError(f"mass: expected a probability in (0, 1], got {mass}")
        for name, asked in (("top_k", top_k), ("mass", mass)):
            held = getattr(self.header, name)
            if asked is not None and asked > held:
                raise CacheMismatchError(
                    f"{self.path}: was captured with {name} {held:g} and cannot be read with "
                    f"{asked:g}: ask for at most that, or capture again"
                )
        # "As captured" means all stored entries: rounded probabilities are not summed again.
        if mass is None or mass == self.header.mass:
            mass = 1.0
        return KeepPolicy(top_k or self.header.top_k, mass)

    def read_held(self, places: Iterable[Place]) -> Iterator[Trace]:
        """Read traces as far as the cache holds them, each shard once; raises as `read`.

        Args:
            places: (shard, row) of each trace, for example some of `traces`.

        Yields:
            Traces, shard by shard. Memory: the traces of one shard.
        """
        for shard, rows in rows_by_shard(places).items():
            infos = self.shards[shard].traces
            yield from self.read(shard, {row: self.num_held(infos[row]) for row in rows}).values()

    def read(
        self, shard_index: int, keep: Mapping[int, int], view: KeepPolicy | None = None
    ) -> dict[int, Trace]:
        """Read the first tokens of some traces of one shard.

        The bytes read are one prefix of the file: the leading bands that hold these tokens.

        Args:
            shard_index: Index into `shards`.
            keep: Row in the shard -> number of its tokens, 1 to n_total.
            view: Policy for fewer entries per token than are stored, from `view()`.

        Returns:
            Row -> its trace, cut to the tokens asked for.

        Raises:
            CacheFormatError: If the shard is missing, damaged, or contradicts its record.
            ConnectionError: If it is remote and cannot be reached.
            OSError: If it cannot be read for another reason.
            CacheMismatchError: If `keep` asks for tokens that a truncated cache does not hold.
            ValueError: If `keep` asks for tokens that a trace does not have.
        """
        commit = self.shards[shard_index]
        where = f"{self.path}: shard {commit.name}.arrow"
        for row, num_tokens in keep.items():
            if not 1 <= num_tokens <= commit.traces[row].n_total:
                raise ValueError(
                    f"{where}: trace {commit.traces[row].trace_id!r} has "
                    f"{commit.traces[row].n_total} tokens, {num_tokens} were asked for"
                )
        held = {row: self.num_held(commit.traces[row]) for row in keep}
        for row, num_tokens in keep.items():
            if num_tokens > held[row]:
                raise CacheMismatchError(
                    f"{where}: the cache was truncated to {self.header.held_part} and holds "
                    f"{held[row]} tokens of trace {commit.traces[row].trace_id!r}, {num_tokens} "
                    f"were asked for. Train on {self.header.held_options}, or on the cache it was "
                    "made from."
                )
        spans = ((held[row], count) for row, count in keep.items())
        num_bands = num_bands_needed(spans, len(commit.blocks))
        data = self._read_prefix(commit, num_bands, where)
        bands = decode_bands(data, commit, num_bands, self.header, where)
        traces = {row: assemble(commit, row, count, bands, where) for row, count in keep.items()}
        if view is None or (view.top_k >= self.header.top_k and view.mass >= 1.0):
            return traces
        return {row: narrowed(trace, view) for row, trace in traces.items()}

    def messages(self, trace_id: str) -> dict[str, Any] | None:
        """The prompt of a trace: `messages`, and `tools` and `chat_template_kwargs` if any.

        The messages are those before the assistant's turn, reasoning under `reasoning_content`;
        if that turn calls tools, `response` is its message. None if the prompt was
        text, or if the cache was captured before messages were kept.

        Raises:
            CacheFormatError: If the file of the messages is missing or damaged.
            TraceNotFoundError: If the cache has no such trace.
        """
        commit = self.shards[self.place(trace_id)[0]]
        if commit.messages is None:
            return None
        if self._messages is None or self._messages[0] != commit.name:
            self._messages = (commit.name, read_messages(self.store, commit))
        asked: dict[str, Any] | None = self._messages[1].get(trace_id)
        return asked

    def _read_prefix(self, commit: ShardCommit, num_bands: int, where: str) -> pa.Buffer:
        size = commit.prefix_bytes(num_bands)

        def fetch(offset: int, num_bytes: int) -> pa.Buffer:
            data = self.store.read_range(shard_file(commit.name), offset, num_bytes)
            self.bytes_fetched += data.size
            return data

        kept = self.prefix_cache
        try:
            data = fetch(0, size) if kept is None else kept.read(commit.sha256, size, fetch)
            damage = _damage(data, commit, num_bands)
            if kept is not None and damage is not None:
                logger.warning("%s: damaged in the prefix cache, fetched again", where)
                kept.drop(commit.sha256)
                data = kept.read(commit.sha256, size, fetch)
                damage = _damage(data, commit, num_bands)
                if damage is not None:
                    kept.drop(commit.sha256)  # it arrived damaged; its source may be repaired
        except FileNotFoundError as error:
            raise CacheFormatError(f"{where} is missing; {repair_advice(self.path)}") from error
        self.bytes_read += data.size
        if damage is not None:
            raise CacheFormatError(f"{where}: {damage}; {repair_advice(self.path)}")
        return data


def _damage(data: pa.Buffer, commit: ShardCommit, num_bands: int) -> str | None:
    """Damage to the first bands of a shard; None if they match the commit record."""
    size = commit.prefix_bytes(num_bands)
    if data.size != size:
        return f"expected {size} bytes, the file ends at {data.size}"
    view = memoryview(data)
    for band, block in enumerate(commit.blocks[:num_bands]):
        found = zlib.crc32(view[block.offset : block.offset + block.length])
        if found != block.crc32:
            return f"band {band} is damaged (crc32 {found:08x}, expected {block.crc32:08x})"
    return None


def open_cache(
    path: CachePath,
    *,
    allow_unsealed: bool = False,
    snapshot: ShardList | None = None,
    prefix_cache: PrefixCache | None = None,
) -> Cache:
    """Open a cache for reading.

    Args:
        path: A folder, or a URI that pyarrow.fs knows (s3://, gs://, hdfs://, file://).
        allow_unsealed: Take a snapshot of the shards committed so far if the capture is not
            complete.
        snapshot: `Cache.snapshot` of an earlier opening: opens the same shards, whatever else has
            been committed meanwhile.
        prefix_cache: Local folder that keeps what is read of its shards.

    Raises:
        CacheFormatError: If there is no cache, or a commit record or shard is missing or damaged.
        CacheMismatchError: If the cache is not sealed and that was not allowed.
    """
    store = open_store(path)
    manifest = require_manifest(store)
    if manifest.seal is None and not allow_unsealed:
        raise CacheMismatchError(
            f"{store.where}: the capture is not complete (no seal). Run cache-teacher again to "
            "finish it, seal it as it is with `cache-teacher seal`, or read what is committed "
            "so far with --allow-unsealed."
        )
    sealed = None if manifest.seal is None else manifest.seal.shards
    wanted = sealed if snapshot is None else snapshot
    names = committed_names(store) if wanted is None else [name for name, _ in wanted]
    catalog = open_catalog(store, manifest, names)
    for found, expected in zip(catalog.shard_list, wanted or catalog.shard_list, strict=True):
        if found != expected:
            raise CacheFormatError(
                f"{store.where}: the commit record of {expected[0]} is not the "
                f"{'sealed one' if snapshot is None else 'one read before'}; "
                f"{repair_advice(store.where)}"
            )
    _check_shard_files(store, catalog)
    return Cache(
        path=store.where,
        manifest=manifest,
        catalog=catalog,
        fingerprint=shards_fingerprint(catalog.shard_list),
        store=store,
        prefix_cache=prefix_cache,
    )


def _check_shard_files(store: Store, catalog: Catalog) -> None:
    """Find a missing or cut shard now, where that is cheap; reading finds every one."""
    if store.folder is None and catalog.num_shards > _MOST_LISTED_SHARDS:
        return
    sizes = store.sizes(SHARD_FOLDER)
    columns = (catalog.shards[name].to_pylist() for name in ("name", "size_bytes"))
    for name, expected_bytes in zip(*columns, strict=True):
        if f"{name}.json" not in sizes:
            raise CacheFormatError(
                f"{store.where}: the commit record of shard {name!r} is missing; "
                f"{repair_advice(store.where)}"
            )
        size_bytes = sizes.get(f"{name}.arrow")
        if size_bytes is None:
            raise CacheFormatError(
                f"{store.where}: shard {name}.arrow is missing; {repair_advice(store.where)}"
            )
        if size_bytes != expected_bytes:
            raise CacheFormatError(
                f"{store.where}: shard {name}.arrow has {size_bytes} bytes, expected "
                f"{expected_bytes}: it is damaged or only partly copied; "
                f"{repair_advice(store.where)}"
            )
