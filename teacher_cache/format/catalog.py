"""The catalogue: every trace and shard of a cache in columns, one row per trace.

A sealed cache has it as `catalog.parquet`; for any other it is made from the commit records. Its
rows are in the order of shards, by name, and of the rows in them. A column is read when first used.
"""

from __future__ import annotations

import threading
from dataclasses import fields
from functools import cached_property, lru_cache
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from teacher_cache.format.bands import lead_span_lengths
from teacher_cache.format.catalog_fields import parsed_fields
from teacher_cache.format.commit import (
    Block,
    FileDigest,
    ShardCommit,
    TraceInfo,
    check_commit,
    check_layout,
)
from teacher_cache.format.errors import CacheFormatError
from teacher_cache.format.header import CacheHeader
from teacher_cache.format.manifest import Seal

CATALOG_FILE = "catalog.parquet"

_HELD = "n_held"  # only in a cache of several lead spans
TRACE_FACTS = tuple(item.name for item in fields(TraceInfo) if item.name not in ("fields", _HELD))
SHARD_COUNTS = ("size_bytes", "num_entries", "num_clamped_tails", "num_clamped_logits")
_MESSAGES = pa.struct({"size_bytes": pa.int64(), "sha256": pa.string()})
_BLOCK = pa.struct(dict.fromkeys(("offset", "length", "crc32", "num_tokens"), pa.int64()))
SHARD_RECORD = pa.struct({
    "checksum": pa.string(),
    "sha256": pa.string(),
    **dict.fromkeys(SHARD_COUNTS, pa.int64()),
    "messages": _MESSAGES,
    "blocks": pa.list_(_BLOCK),
})  # fmt: skip
CATALOG_COLUMNS = pa.schema({
    "trace_id": pa.string(),
    "shard": pa.dictionary(pa.int32(), pa.string()),
    "row": pa.int32(),
    "n_total": pa.int32(),
    "cot_start": pa.int32(),
    "answer_start": pa.int32(),
    "finish_reason": pa.dictionary(pa.int32(), pa.string()),
    "source_hash": pa.string(),
    "is_duplicate": pa.bool_(),
    "fields_json": pa.string(),
    "shard_record": SHARD_RECORD,
})  # fmt: skip
_OPTIONAL = ("fields", "fields_json", "shard_record")  # with nulls; the first may be missing


def catalog_columns(header: CacheHeader) -> pa.Schema:
    """Columns of the catalogue of a cache, without those of the user's fields."""
    if header.lead_spans is None:
        return CATALOG_COLUMNS
    return CATALOG_COLUMNS.append(pa.field(_HELD, pa.int32()))


def trace_facts(header: CacheHeader) -> tuple[str, ...]:
    """Those of them that are facts of a trace, as in TraceInfo."""
    return TRACE_FACTS if header.lead_spans is None else (*TRACE_FACTS, _HELD)


class Catalog:
    """Columns of every trace and shard; immutable."""

    def __init__(self, source: pa.Table | pq.ParquetFile, header: CacheHeader, where: str) -> None:
        """Take the columns from a table or a file.

        Args:
            source: Columns as SPEC.md lists them.
            header: Header of the cache.
            where: Name of the source, for messages.

        Raises:
            CacheFormatError: If columns are missing, or contradict each other.
        """
        self._source = source
        self._header = header
        self._header_fingerprint = header.fingerprint
        self._where = where
        self._columns: dict[str, pa.ChunkedArray] = {}
        self._lock = threading.Lock()  # a file has one position
        is_table = isinstance(source, pa.Table)
        self.schema: pa.Schema = source.schema if is_table else source.schema_arrow
        self.num_rows: int = source.num_rows if is_table else source.metadata.num_rows
        starts = np.flatnonzero(self.numbers("row") == 0)
        self.first_row: NDArray[np.int64] = np.append(starts, self.num_rows)  # [S + 1]
        self.commit = lru_cache(16)(self._commit)
        self._check()

    def __reduce__(self) -> tuple[type[Self], tuple[pa.Table, CacheHeader, str]]:
        """Another process gets the columns as a table: it has no part in an open file."""
        is_table = isinstance(self._source, pa.Table)
        with self._lock:
            table = self._source if is_table else self._source.read()
        return type(self), (table, self._header, self._where)

    def column(self, name: str) -> pa.ChunkedArray:
        """A column, in memory from now on.

        Raises:
            CacheFormatError: If it cannot be read, or is not what it should be.
        """
        with self._lock:
            if name not in self._columns:
                self._columns[name] = self._read(name)
            return self._columns[name]

    def _read(self, name: str) -> pa.ChunkedArray:
        is_table = isinstance(self._source, pa.Table)
        return self._checked(name, self._source[name]) if is_table else self._of_file(name)

    def _of_file(self, name: str, row_group: int | None = None) -> pa.ChunkedArray:
        try:
            if row_group is None:
                table = self._source.read([name], use_threads=False)
            else:
                table = self._source.read_row_group(row_group, [name], use_threads=False)
            return self._checked(name, table[name])
        except (pa.ArrowException, OSError, KeyError) as error:
            raise CacheFormatError(f"{self._where}: column {name!r}: {error}") from error

    def _checked(self, name: str, found: pa.ChunkedArray) -> pa.ChunkedArray:
        columns = catalog_columns(self._header)
        kind = found.type if name == "fields" else columns.field(name).type
        if found.type != kind or (name == "fields" and not pa.types.is_struct(kind)):
            raise CacheFormatError(
                f"{self._where}: column {name!r} has an unexpected type, {found.type}"
            )
        if name not in _OPTIONAL and found.null_count:
            raise CacheFormatError(f"{self._where}: column {name!r} has rows without a value")
        return found

    def numbers(self, name: str) -> NDArray[np.int64]:
        """[rows] A column of whole numbers."""
        found: NDArray[np.int64] = self.column(name).to_numpy().astype(np.int64)
        return found

    @cached_property
    def counted(self) -> NDArray[np.int64]:
        """[traces] Rows of the traces, each counted once: in the first shard that holds it."""
        return np.flatnonzero(~self.column("is_duplicate").to_numpy())

    @cached_property
    def num_held(self) -> NDArray[np.int64]:
        """[rows] Number of leading tokens that the cache holds of every trace."""
        if self._header.lead_spans is not None:
            return self.numbers(_HELD)
        return lead_span_lengths(self.numbers("n_total"), self._header.max_lead_span)

    @cached_property
    def shards(self) -> pa.Table:
        """One row per shard: its name, number of traces, and the record's other facts."""
        first = pa.array(self.first_row[:-1])
        records = self._records()
        if len(records) != self.num_shards:
            raise CacheFormatError(f"{self._where}: expected a shard_record in each row 0")
        columns = dict(zip(SHARD_RECORD.names, records.flatten(), strict=True))
        names = self.column("shard").take(first).cast(pa.string())
        return pa.table({"name": names, "num_traces": np.diff(self.first_row), **columns})

    def seal(self, file: FileDigest | None) -> Seal:
        """Seal of a cache with these shards.

        Args:
            file: Digest of `catalog.parquet`.
        """
        num_traces = len(self.counted)
        return Seal(
            shards=self.shard_list,
            num_traces=num_traces,
            num_tokens=int(self.num_held[self.counted].sum()),
            num_duplicates=self.num_rows - num_traces,
            catalog=file,
        )

    def _records(self) -> pa.StructArray:
        """The records of shards; a part of the file at a time, for most of its rows have none."""
        if isinstance(self._source, pa.Table):
            parts = [self.column("shard_record").drop_null()]
        else:
            with self._lock:
                parts = [
                    self._of_file("shard_record", group).drop_null()
                    for group in range(self._source.num_row_groups)
                ]
        chunks = [chunk for part in parts for chunk in part.chunks]
        return pa.chunked_array(chunks, SHARD_RECORD).combine_chunks()

    @cached_property
    def band_ends(self) -> NDArray[np.int64]:
        """[shards, S + 1] Bytes of a shard from its start to the end of its first 0 to S bands."""
        blocks = self.shards["blocks"].combine_chunks()
        lengths = blocks.flatten().field("length").to_numpy()
        try:
            lengths = lengths.reshape(self.num_shards, self._header.num_bands)
        except ValueError as error:
            raise CacheFormatError(f"{self._where}: a shard without all bands") from error
        ends = np.zeros((self.num_shards, self._header.num_bands + 1), np.int64)
        np.cumsum(lengths, axis=1, out=ends[:, 1:])
        return ends

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self.first_row) - 1

    @cached_property
    def shard_list(self) -> tuple[tuple[str, str], ...]:
        """Name and commit checksum of every shard."""
        columns = (self.shards[name].to_pylist() for name in ("name", "checksum"))
        return tuple(zip(*columns, strict=True))

    def count(self, name: str, value: str) -> int:
        """Number of traces, each counted once, that have a value."""
        column = self.column(name).take(pa.array(self.counted)).cast(pa.string())
        return int(pc.sum(pc.equal(column, value)).as_py() or 0)

    def total(self, name: str) -> int:
        """Sum of a count over the shards."""
        return int(self.shards[name].to_numpy().sum())

    @cached_property
    def num_tokens(self) -> int:
        """Tokens in all shards, copies of traces included."""
        return int(self.num_held.sum())

    def index(self, shard: int, row: int) -> int:
        """Row of the catalogue for a row of a shard."""
        return int(self.first_row[shard]) + row

    def trace_ids(self, index: NDArray[np.int64]) -> list[str]:
        """The ids of the traces in some rows."""
        return self.values("trace_id", index)

    def values(self, name: str, index: NDArray[np.int64]) -> list[Any]:
        """The values of a column in some rows."""
        found: list[Any] = _taken(self.column(name), index).to_pylist()
        return found

    def info(self, index: int) -> TraceInfo:
        """The facts of the trace in one row."""
        names = trace_facts(self._header)
        facts = [self.column(name)[index].as_py() for name in names]
        (own,) = self._fields(slice(index, index + 1))
        return TraceInfo(**dict(zip(names, facts, strict=True)), fields=own)

    def infos(self, index: NDArray[np.int64]) -> list[TraceInfo]:
        """The facts of the traces in some rows."""
        names = trace_facts(self._header)
        columns = [self.values(name, index) for name in names]
        return [
            TraceInfo(**dict(zip(names, facts, strict=True)), fields=own)
            for facts, own in zip(zip(*columns, strict=True), self.fields(index), strict=True)
        ]

    def fields(self, index: NDArray[np.int64]) -> list[dict[str, Any]]:
        """The user's fields of the traces in some rows."""
        return self._fields(index)

    def field(self, name: str, index: NDArray[np.int64]) -> list[Any]:
        """One of the user's fields of the traces in some rows; None where it is missing."""
        if name not in self.typed_names:
            return [own.get(name) for own in self.fields(index)]
        values: list[Any] = pc.struct_field(_taken(self.column("fields"), index), name).to_pylist()
        return values

    def _fields(self, rows: NDArray[np.int64] | slice) -> list[dict[str, Any]]:
        names = ["fields", "fields_json"] if self.typed_names else ["fields_json"]
        columns = [self.column(name) for name in names]
        parts = [
            column[rows] if isinstance(rows, slice) else _taken(column, rows) for column in columns
        ]
        try:
            return parsed_fields(parts[0] if self.typed_names else None, parts[-1])
        except ValueError as error:
            raise CacheFormatError(f"{self._where}: fields of a trace: {error}") from error

    @cached_property
    def field_names(self) -> set[str]:
        """Names of the user's fields of all traces."""
        texts = self.column("fields_json").drop_null()
        first_of_all = range(0, len(texts), 1 << 16)
        parts = (parsed_fields(None, texts.slice(first, 1 << 16)) for first in first_of_all)
        return {*self.typed_names, *(name for part in parts for own in part for name in own)}

    def table(self) -> pa.Table:
        """All columns."""
        return pa.table({name: self.column(name) for name in self.schema.names})

    @cached_property
    def typed_names(self) -> list[str]:
        """Names of the user's fields that have a column of their own."""
        if "fields" not in self.schema.names:
            return []
        kind = self.schema.field("fields").type
        return [kind.field(number).name for number in range(kind.num_fields)]

    def _commit(self, shard: int) -> ShardCommit:
        """The commit record of a shard; raises CacheFormatError where it cannot be one."""
        record = self.shards.slice(shard, 1).to_pylist()[0]
        num_traces, messages = record.pop("num_traces"), record.pop("messages")
        first, end = self.first_row[shard : shard + 2].tolist()
        try:
            blocks = tuple(Block(**block, num_rows=num_traces) for block in record.pop("blocks"))
            commit = ShardCommit(
                **record,
                blocks=blocks,
                traces=tuple(self.infos(np.arange(first, end))),
                messages=None if messages is None else FileDigest(**messages),
                header_fingerprint=self._header_fingerprint,
            )
            check_layout(commit, commit.name, f"{self._where}: shard {commit.name}")
            check_commit(commit, self._header)
        except (TypeError, ValueError) as error:
            raise CacheFormatError(f"{self._where}: row {first}: {error!r}") from error
        return commit

    def _check(self) -> None:
        rows = self.numbers("row")
        starts = np.repeat(self.first_row[:-1], np.diff(self.first_row))
        cot, answer, n = (
            self.column(name).to_numpy() for name in ("cot_start", "answer_start", "n_total")
        )
        in_order = (cot >= 0) & (cot <= answer) & (answer <= n) & (n >= 1)
        if self._header.lead_spans is not None:
            in_order &= (self.num_held >= 1) & (self.num_held <= n)
        if not np.array_equal(rows + starts, np.arange(self.num_rows)) or not in_order.all():
            raise CacheFormatError(f"{self._where}: its rows contradict each other")


def _taken(column: pa.ChunkedArray, index: NDArray[np.int64]) -> pa.ChunkedArray:
    """The values in some rows; pyarrow joins all chunks to take, and cannot beyond 2 GB of text."""
    first, end = (int(index.min()), int(index.max()) + 1) if len(index) else (0, 0)
    return column.slice(first, end - first).take(pa.array(index - first))
