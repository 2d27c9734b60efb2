"""The catalogue of a cache, made from its commit records."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from teacher_cache.format.catalog import (
    SHARD_COUNTS,
    SHARD_RECORD,
    Catalog,
    catalog_columns,
    trace_facts,
)
from teacher_cache.format.catalog_fields import json_of_fields
from teacher_cache.format.commit import ShardCommit
from teacher_cache.format.errors import CacheFormatError
from teacher_cache.format.header import CacheHeader


def catalog_of(commits: Iterable[ShardCommit], header: CacheHeader, where: str) -> Catalog:
    """Make the catalogue from commit records, in the order of their names.

    One record is in memory at a time, besides the columns. The user's fields are all in
    `fields_json`.

    Raises:
        CacheFormatError: If a value cannot be kept, such as a name that is not Unicode.
    """
    batches = []
    columns = catalog_columns(header)
    try:
        for commit in commits:
            batches.append(_rows(commit, header))
    except (pa.ArrowException, UnicodeError, OverflowError) as error:
        raise CacheFormatError(f"{where}: commit record of {commit.name}: {error}") from error
    plain = pa.schema([_plain(field) for field in columns if field.name != "is_duplicate"])
    table = pa.Table.from_batches(batches, plain).combine_chunks()
    id_numbers = np.concatenate(
        [chunk.indices.to_numpy() for chunk in table["trace_id"].dictionary_encode().chunks]
        or [np.zeros(0, np.int32)]
    )
    is_copy = np.ones(table.num_rows, bool)
    is_copy[np.unique(id_numbers, return_index=True)[1]] = False
    table = table.append_column("is_duplicate", pa.array(is_copy))
    for name in ("shard", "finish_reason"):
        position = table.schema.get_field_index(name)
        table = table.set_column(position, name, table[name].dictionary_encode())
    return Catalog(table.select(columns.names), header, where)


def _plain(field: pa.Field) -> pa.Field:
    """The column before its values are shared."""
    return pa.field(field.name, pa.string()) if pa.types.is_dictionary(field.type) else field


def _rows(commit: ShardCommit, header: CacheHeader) -> pa.RecordBatch:
    kinds = catalog_columns(header)
    traces, num_traces = commit.traces, len(commit.traces)
    record: dict[str, Any] = {name: getattr(commit, name) for name in ("checksum", "sha256")}
    record |= {name: getattr(commit, name) for name in SHARD_COUNTS}
    record["messages"] = None if commit.messages is None else vars(commit.messages)
    record["blocks"] = [vars(block) for block in commit.blocks]
    columns: dict[str, Any] = {
        name: pa.array([getattr(trace, name) for trace in traces], _plain(kinds.field(name)).type)
        for name in trace_facts(header)
    }
    columns["shard"] = pa.array([commit.name] * num_traces)
    columns["row"] = pa.array(np.arange(num_traces, dtype=np.int32))
    columns["fields_json"] = json_of_fields([trace.fields for trace in traces])
    records = [record, *[None] * (num_traces - 1)]
    columns["shard_record"] = pa.array(records, SHARD_RECORD)
    names = [name for name in kinds.names if name != "is_duplicate"]
    return pa.record_batch([columns[name] for name in names], names=names)
