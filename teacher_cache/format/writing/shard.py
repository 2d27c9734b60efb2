"""Encodes traces as the bytes of one shard, band by band.

Letters: E kept entries.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
_GROUP_ENTRIES = 1 << 17
_LONG_SPAN = 64  # values
ZSTD_LEVEL = 1  # smaller and faster than 3 and 9 on this data: match finding is noise


@dataclass(frozen=True)
class EncodedShard:
    """The bytes of a shard's file, and its bands."""

    data: memoryview
    blocks: tuple[Block, ...]


def encode_shard(traces: Sequence[Trace], header: CacheHeader) -> EncodedShard:
    """Encode traces as one Arrow IPC file whose record batch b is band b of every trace.

    Memory: the traces, the file (about SHARD_BYTES), one band's arrays, and all columns once more
    as the file has them: 3 bytes per entry (5 where ids are wide) and 9 per token.

    Args:
        traces: At least one trace, with all the tokens that the cache is to hold.
        header: Header of the cache; goes into the schema's metadata.
    """
    columns = _columns_of(traces, header)
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(
        compression=pa.Codec("zstd", compression_level=ZSTD_LEVEL), use_threads=False
    )
    ends = [0]
    num_tokens = []
    with pa.ipc.new_file(sink, columns.schema, options=options) as writer:
        for band in range(header.num_bands):
            batch = columns.band(band)
            writer.write_batch(batch)
            ends.append(sink.tell())
            num_tokens.append(len(batch["token_ids"].values))
    data = memoryview(sink.getvalue()).cast("B")
    blocks = tuple(
        block_of(data[begin:end], begin, len(traces), count)
        for begin, end, count in zip(ends[:-1], ends[1:], num_tokens, strict=True)
    )
    return EncodedShard(data, blocks)


@dataclass(frozen=True)
class _Columns:
    """Values of all traces, one after the other, from which each record batch takes its band."""

    schema: pa.Schema
    trace_ids: pa.Array
    id_dictionary: pa.Array
    per_trace: Mapping[str, NDArray[np.int32]]  # [traces]
    per_token: Mapping[str, NDArray[np.generic]]  # [tokens]
    places: NDArray[np.unsignedinteger]  # [E] in the dictionary
    codes: NDArray[np.uint8]  # [E] of logits
    token_bounds: NDArray[np.int64]  # [traces, bands + 1] where bands begin among all tokens
    first_tokens: NDArray[np.int64]  # [traces]
    entry_bounds: NDArray[np.int64]  # the same as of tokens, in entries

    def band(self, band: int) -> pa.RecordBatch:
        """The record batch of a band."""
        tokens = _Spans(self.token_bounds[:, band : band + 2])
        entries = _Spans(self.entry_bounds[:, band : band + 2])
        num_traces = len(self.first_tokens)
        rows = np.arange(num_traces, dtype=np.int32)
        arrays = {
            "trace_id": pa.DictionaryArray.from_arrays(rows, self.trace_ids),
            "band": np.full(num_traces, band, np.uint8),
            "start": (self.token_bounds[:, band] - self.first_tokens).astype(np.int32),
            **self.per_trace,
            "top_ids": pa.ListArray.from_arrays(
                entries.offsets,
                pa.DictionaryArray.from_arrays(entries.of(self.places), self.id_dictionary),
            ),
            "top_logits": pa.ListArray.from_arrays(
                entries.offsets,
                pa.DictionaryArray.from_arrays(entries.of(self.codes), LOGIT_GRID),
            ),
        }
        for name, values in self.per_token.items():
            arrays[name] = pa.ListArray.from_arrays(tokens.offsets, pa.array(tokens.of(values)))
        return pa.RecordBatch.from_arrays(
            [pa.array(arrays[name]) for name in self.schema.names], schema=self.schema
        )


def _columns_of(traces: Sequence[Trace], header: CacheHeader) -> _Columns:
    groups = list(_groups(traces))
    ids = _ids_by_falling_frequency(groups)
    wide = len(ids) > MAX_NARROW_IDS
    schema = shard_schema(header, wide_ids=wide)
    places = _places_with_small_bytes(len(ids))
    id_dictionary = np.zeros(int(places.max(initial=-1)) + 1, np.int32)
    id_dictionary[places] = ids
    index_type: type[np.unsignedinteger] = np.uint32 if wide else np.uint16
    index_of_id = np.zeros(int(ids.max(initial=-1)) + 1, index_type)
    index_of_id[ids] = places
    names = ("token_ids", "k", "tail_logit", *set(OPTIONAL_COLUMNS).intersection(schema.names))
    per_token = {name: np.concatenate(_column(name, traces)) for name in names}
    ends = entry_offsets([len(trace) for trace in traces])
    lengths = np.diff(ends)
    token_bounds = ends[:-1, None] + band_starts(lengths, header.num_bands).T
    return _Columns(
        schema=schema,
        trace_ids=pa.array([trace.trace_id for trace in traces], pa.string()),
        id_dictionary=pa.array(id_dictionary),
        per_trace={
            name: np.array([getattr(trace, name) for trace in traces], np.int32)
            for name in ("n_total", "cot_start", "answer_start")
        },
        per_token=per_token,
        places=_filled(groups, "top_ids", index_of_id.__getitem__, index_type),
        codes=_filled(groups, "top_logits", logit_codes, np.uint8),
        token_bounds=token_bounds,
        first_tokens=ends[:-1],
        entry_bounds=entry_offsets(per_token["k"])[token_bounds],
    )


def _groups(traces: Sequence[Trace]) -> Iterator[list[Trace]]:
    """The traces in groups of about as many entries, whose values are looked up at once."""
    group, num_entries = list[Trace](), 0
    for trace in traces:
        group.append(trace)
        num_entries += trace.num_entries
        if num_entries >= _GROUP_ENTRIES:
            yield group
            group, num_entries = [], 0
    if group:
        yield group


def _joined(name: str, traces: Sequence[Trace]) -> NDArray[Any]:
    return np.concatenate([getattr(trace, name) for trace in traces])


def _filled(
    groups: Sequence[Sequence[Trace]],
    name: str,
    look_up: Callable[[NDArray[Any]], NDArray[Any]],
    dtype: type[np.unsignedinteger],
) -> NDArray[Any]:
    """[E] what all entries' values are in the file; the values exist once per group alone."""
    found = np.empty(sum(trace.num_entries for group in groups for trace in group), dtype)
    end = 0
    for group in groups:
        values = look_up(_joined(name, group))
        found[end : end + len(values)] = values
        end += len(values)
    return found


def _column(name: str, traces: Sequence[Trace]) -> list[NDArray[np.generic]]:
    columns = []
    for trace in traces:
        column = getattr(trace, name)
        if column is None:
            raise ValueError(f"trace {trace.trace_id!r}: expected {name}, got none")
        columns.append(column)
    return columns


class _Spans:
    """Pairs of bounds [traces, 2], whose values are taken one after the other."""

    def __init__(self, bounds: NDArray[np.int64]) -> None:
        offsets = entry_offsets(bounds[:, 1] - bounds[:, 0])
        self.offsets = pa.array(offsets.astype(np.int32))
        num_values = int(offsets[-1])
        self._slices, self._places = None, None
        if num_values >= _LONG_SPAN * len(bounds):
            self._slices = [slice(*pair) for pair in bounds.tolist()]
        else:  # a slice costs as much as many values
            places = (bounds[:, 0] - offsets[:-1]).repeat(np.diff(offsets))
            self._places = places + np.arange(num_values)

    def of(self, values: NDArray[Any]) -> NDArray[Any]:
        """The values between the bounds."""
        if self._slices is not None:
            return np.concatenate([values[each] for each in self._slices])
        return values[self._places]


def _ids_by_falling_frequency(groups: Sequence[Sequence[Trace]]) -> NDArray[np.int32]:
    """Distinct kept ids, most frequent first (then by id): small indices compress best."""
    counts = np.zeros(1, np.int64)
    for group in groups:
        of_group = np.bincount(_joined("top_ids", group))
        if len(of_group) > len(counts):
            of_group, counts = counts, of_group
        counts[: len(of_group)] += of_group
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
