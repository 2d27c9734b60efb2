"""Encodes traces as the bytes of one shard, band by band.

Letters: E kept entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from teacher_cache.format.bands import band_starts
from teacher_cache.format.codec import LOGIT_GRID, logit_codes
from teacher_cache.format.commit import Block, block_of
from teacher_cache.format.header import CacheHeader
from teacher_cache.format.ragged import entry_offsets
from teacher_cache.format.schema import MAX_NARROW_IDS, shard_schema
from teacher_cache.format.trace import OPTIONAL_COLUMNS, Trace

BYTE_COST_OFFSET = 0.3  # slightly the best of 0.3 to 8 on Zipf ids
THIRD_BYTE_COST = 3.0  # bits
ZSTD_LEVEL = 1  # smaller and faster than 3 and 9 on this data: match finding is noise


@dataclass(frozen=True)
class EncodedShard:
    """The bytes of a shard's file, and its bands."""

    data: memoryview
    blocks: tuple[Block, ...]


def encode_shard(traces: Sequence[Trace], header: CacheHeader) -> EncodedShard:
    """Encode traces as one Arrow IPC file whose record batch b is band b of every trace.

    Memory: the traces, the file (about SHARD_BYTES) and one band's arrays.

    Args:
        traces: At least one trace, with all the tokens that the cache is to hold.
        header: Header of the cache; goes into the schema's metadata.
    """
    ids = _ids_by_falling_frequency(traces)
    wide = len(ids) > MAX_NARROW_IDS
    places = _places_with_small_bytes(len(ids))
    id_dictionary = np.zeros(int(places.max(initial=-1)) + 1, np.int32)
    id_dictionary[places] = ids
    index_type: type[np.unsignedinteger] = np.uint32 if wide else np.uint16
    index_of_id = np.zeros(int(ids.max(initial=-1)) + 1, index_type)
    index_of_id[ids] = places
    lengths = np.array([len(trace) for trace in traces])
    token_bounds = band_starts(lengths, header.num_bands).T
    columns = _Columns(
        schema=shard_schema(header, wide_ids=wide),
        trace_ids=pa.array([trace.trace_id for trace in traces], pa.string()),
        id_dictionary=pa.array(id_dictionary),
        index_of_id=index_of_id,
        token_bounds=token_bounds,
        entry_bounds=np.array(
            [t.entry_offsets[bounds] for t, bounds in zip(traces, token_bounds, strict=True)]
        ),
    )
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(
        compression=pa.Codec("zstd", compression_level=ZSTD_LEVEL), use_threads=False
    )
    ends = [0]
    num_tokens = []
    with pa.ipc.new_file(sink, columns.schema, options=options) as writer:
        for band in range(header.num_bands):
            batch = columns.band(traces, band)
            writer.write_batch(batch)
            ends.append(sink.tell())
            num_tokens.append(len(batch["token_ids"].values))
    data = memoryview(sink.getvalue()).cast("B")
    blocks = tuple(
        block_of(data[begin:end], begin, len(traces), count)
        for begin, end, count in zip(ends[:-1], ends[1:], num_tokens, strict=True)
    )
    return EncodedShard(data, blocks)


def _ids_by_falling_frequency(traces: Sequence[Trace]) -> NDArray[np.int32]:
    """Distinct kept ids, most frequent first (then by id): small indices compress best."""
    counts = np.zeros(1, np.int64)
    for trace in traces:
        of_trace = np.bincount(trace.top_ids)
        if len(of_trace) > len(counts):
            of_trace, counts = counts, of_trace
        counts[: len(of_trace)] += of_trace
    order = np.argsort(-counts, kind="stable")
    return order[: np.count_nonzero(counts)].astype(np.int32)


def _places_with_small_bytes(num_ids: int) -> NDArray[np.int64]:
    """Dictionary places that compress best, for ids by falling frequency.

    zstd codes all bytes of an index with one table. Numbered 0, 1, 2, ... the low byte would take
    all values and the next few; with frequent ids at places where both are small, both follow
    one falling distribution. The third byte of wide indices stays small. Other places are unused.
    """
    cost = np.log2(np.arange(256) + BYTE_COST_OFFSET)
    costs = cost[:, None] + cost
    if num_ids > MAX_NARROW_IDS:
        high = THIRD_BYTE_COST * np.arange(num_ids // MAX_NARROW_IDS + 2)
        costs = high[:, None, None] + costs
    places: NDArray[np.int64] = np.argsort(costs.ravel(), kind="stable")[:num_ids]
    return places


@dataclass(frozen=True)
class _Columns:
    """Values shared by the record batches of a shard."""

    schema: pa.Schema
    trace_ids: pa.Array
    id_dictionary: pa.Array
    index_of_id: NDArray[np.unsignedinteger]
    token_bounds: NDArray[np.int64]  # [traces, bands + 1]
    entry_bounds: NDArray[np.int64]  # the same, in entries

    def band(self, traces: Sequence[Trace], band: int) -> pa.RecordBatch:
        tokens, per_token = _slices(self.token_bounds[:, band : band + 2])
        entries, per_entry = _slices(self.entry_bounds[:, band : band + 2])
        ids = np.concatenate([t.top_ids[s] for t, s in zip(traces, entries, strict=True)])
        logits = np.concatenate([t.top_logits[s] for t, s in zip(traces, entries, strict=True)])
        rows = np.arange(len(traces), dtype=np.int32)
        arrays = {
            "trace_id": pa.DictionaryArray.from_arrays(rows, self.trace_ids),
            "band": np.full(len(traces), band, np.uint8),
            "start": self.token_bounds[:, band].astype(np.int32),
            "n_total": np.array([t.n_total for t in traces], np.int32),
            "cot_start": np.array([t.cot_start for t in traces], np.int32),
            "answer_start": np.array([t.answer_start for t in traces], np.int32),
            "token_ids": _lists(per_token, [t.token_ids for t in traces], tokens),
            "k": _lists(per_token, [t.k for t in traces], tokens),
            "top_ids": pa.ListArray.from_arrays(
                per_entry,
                pa.DictionaryArray.from_arrays(self.index_of_id[ids], self.id_dictionary),
            ),
            "top_logits": pa.ListArray.from_arrays(
                per_entry, pa.DictionaryArray.from_arrays(logit_codes(logits), LOGIT_GRID)
            ),
            "tail_logit": _lists(per_token, [t.tail_logit for t in traces], tokens),
        }
        for name in set(OPTIONAL_COLUMNS).intersection(self.schema.names):
            arrays[name] = _lists(per_token, _optional(name, traces), tokens)
        return pa.RecordBatch.from_arrays(
            [pa.array(arrays[name]) for name in self.schema.names], schema=self.schema
        )


def _optional(name: str, traces: Sequence[Trace]) -> list[NDArray[np.float32]]:
    columns = []
    for trace in traces:
        column = getattr(trace, name)
        if column is None:
            raise ValueError(f"trace {trace.trace_id!r}: expected {name}, got none")
        columns.append(column)
    return columns


def _slices(bounds: NDArray[np.int64]) -> tuple[list[slice], pa.Array]:
    """Slices from pairs of bounds [traces, 2], and the offsets of what they hold together."""
    offsets = entry_offsets(bounds[:, 1] - bounds[:, 0]).astype(np.int32)
    return [slice(*pair) for pair in bounds.tolist()], pa.array(offsets)


def _lists(
    offsets: pa.Array, columns: Sequence[NDArray[np.generic]], slices: Sequence[slice]
) -> pa.ListArray:
    values = np.concatenate([c[s] for c, s in zip(columns, slices, strict=True)])
    return pa.ListArray.from_arrays(offsets, pa.array(values))
