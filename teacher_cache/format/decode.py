"""Bytes of a shard -> checked numpy arrays -> traces."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from teacher_cache.format.commit import ShardCommit
from teacher_cache.format.errors import CacheFormatError
from teacher_cache.format.header import CacheHeader
from teacher_cache.format.ipc import declared_bytes
from teacher_cache.format.schema import check_schema
from teacher_cache.format.span import band_start
from teacher_cache.format.trace import Trace

_MAGIC_BYTES = 8  # of an IPC file; what follows is an IPC stream
MAX_DECLARED_BYTES = (
    2 << 30
)  # of all buffers of a shard: what a stranger can make a reader allocate


@dataclass(frozen=True)
class Band:
    """One record batch as flat numpy arrays; row r's tokens are token_ends[r]:token_ends[r+1]."""

    token_ends: NDArray[np.int64]  # [rows + 1]
    entry_ends: NDArray[np.int64]  # [tokens + 1]
    token_ids: NDArray[np.int32]
    k: NDArray[np.uint8]
    top_ids: NDArray[np.int32]
    top_logits: NDArray[np.float32]
    tail_logit: NDArray[np.float32]


def decode_bands(
    data: pa.Buffer, commit: ShardCommit, num_bands: int, header: CacheHeader, where: str
) -> list[Band]:
    """Decode the leading bands of a shard and check them against the format and its record.

    Args:
        data: The first bytes of the file, at least to the end of these bands.
        commit: The shard's commit record.
        num_bands: How many leading bands.
        header: Of the cache.
        where: Names the shard in errors.

    Raises:
        CacheFormatError: If anything is not as the format or the record says.
    """
    if num_bands == 0:
        return []
    bands: list[Band] = []
    held = np.array([header.num_held(trace.n_total) for trace in commit.traces], np.int64)
    try:
        stream_bytes = data.slice(_MAGIC_BYTES)
        declared = declared_bytes(memoryview(stream_bytes), num_bands)
        if declared > MAX_DECLARED_BYTES:
            raise CacheFormatError(
                f"{where}: its buffers declare {declared:,} bytes, a shard has at most "
                f"{MAX_DECLARED_BYTES:,}"
            )
        options = pa.ipc.IpcReadOptions(use_threads=False)
        with pa.ipc.open_stream(stream_bytes, options=options) as stream:
            check_schema(stream.schema, header, where)
            for band in range(num_bands):
                batch = stream.read_next_batch()
                batch.validate(full=True)  # indices inside dictionaries, offsets inside buffers
                bands.append(_decode_batch(batch, band, held, commit, header, where))
    except (
        pa.ArrowException,
        OSError,
        StopIteration,
        ValueError,
        IndexError,
        struct.error,
    ) as error:
        raise CacheFormatError(f"{where}: not readable as Arrow: {error}") from error
    return bands


def _decode_batch(
    batch: pa.RecordBatch,
    band: int,
    held: NDArray[np.int64],
    commit: ShardCommit,
    header: CacheHeader,
    where: str,
) -> Band:
    where = f"{where}: band {band}"
    starts = band_start(held, band, header.num_bands)
    num_tokens = band_start(held, band + 1, header.num_bands) - starts
    expected: dict[str, NDArray[Any]] = {
        "band": np.full(len(held), band),
        "start": starts,
        "n_total": np.array([trace.n_total for trace in commit.traces]),
        "cot_start": np.array([trace.cot_start for trace in commit.traces]),
        "answer_start": np.array([trace.answer_start for trace in commit.traces]),
    }
    if batch["trace_id"].to_pylist() != [trace.trace_id for trace in commit.traces]:
        raise CacheFormatError(f"{where}: the trace ids are not those of the commit record")
    for name, values in expected.items():
        if not np.array_equal(_plain(batch, name, where), values):
            raise CacheFormatError(f"{where}: column {name!r} is not what the commit record says")
    k, lengths = _flat(batch, "k", where)
    token_ids, token_lengths = _flat(batch, "token_ids", where)
    tail_logit, tail_lengths = _flat(batch, "tail_logit", where)
    top_ids, id_lengths = _flat(batch, "top_ids", where)
    top_logits, logit_lengths = _flat(batch, "top_logits", where)
    token_ends = np.concatenate([[0], np.cumsum(num_tokens)])
    same_tokens = all(
        np.array_equal(found, num_tokens) for found in (lengths, token_lengths, tail_lengths)
    )
    if not same_tokens:
        raise CacheFormatError(f"{where}: the lists of its columns have wrong lengths")
    entry_ends = np.concatenate([[0], np.cumsum(k, dtype=np.int64)])
    num_entries = entry_ends[token_ends[1:]] - entry_ends[token_ends[:-1]]
    for name, found in (("top_ids", id_lengths), ("top_logits", logit_lengths)):
        if not np.array_equal(found, num_entries):
            raise CacheFormatError(f"{where}: the lists of column {name!r} have wrong lengths")
    decoded = Band(token_ends, entry_ends, token_ids, k, top_ids, top_logits, tail_logit)
    _check_values(decoded, header.vocab_size, where)
    return decoded


def _plain(batch: pa.RecordBatch, name: str, where: str) -> NDArray[Any]:
    column = batch[name]
    if column.null_count:
        raise CacheFormatError(f"{where}: column {name!r} holds nulls")
    values: NDArray[Any] = column.to_numpy()
    return values


def _flat(batch: pa.RecordBatch, name: str, where: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Values of a list column and the length of each list."""
    column = batch[name]
    values = column.flatten()
    if column.null_count or values.null_count:
        raise CacheFormatError(f"{where}: column {name!r} holds nulls")
    lengths = column.value_lengths().to_numpy().astype(np.int64)
    if isinstance(values, pa.DictionaryArray):
        if values.dictionary.null_count:
            raise CacheFormatError(f"{where}: the dictionary of column {name!r} holds nulls")
        values = values.dictionary_decode()
    return values.to_numpy(), lengths


def _check_values(band: Band, vocab_size: int, where: str) -> None:
    for name, ids in (("token_ids", band.token_ids), ("top_ids", band.top_ids)):
        if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
            raise CacheFormatError(f"{where}: {name} outside the vocabulary of {vocab_size}")
    if not np.isfinite(band.tail_logit).all():
        raise CacheFormatError(f"{where}: tail_logit must be finite")
    starts = band.entry_ends[:-1][band.k > 0]
    logits = band.top_logits
    rises = logits[1:] > logits[:-1]
    rises[starts[1:] - 1] = False  # from the last entry of a token to the first of the next
    if len(logits) and (rises.any() or not np.isfinite(logits.min())):
        raise CacheFormatError(f"{where}: top_logits must be finite and not rise within a token")
    if logits[starts].any():
        raise CacheFormatError(f"{where}: the first top_logits of a token must be 0")
    _check_realised(band, starts, where)


def _check_realised(band: Band, starts: NDArray[np.int64], where: str) -> None:
    """Every token with entries is once among them: a capture that is off by one fails here."""
    found = np.flatnonzero(band.top_ids == np.repeat(band.token_ids, band.k))
    # The i-th token with entries holds the i-th hit, or some token has none or two.
    ends = starts + band.k[band.k > 0]
    if len(found) != len(starts) or (found < starts).any() or (found >= ends).any():
        raise CacheFormatError(
            f"{where}: {len(starts)} tokens have entries, but not each of these holds the token "
            f"itself once ({len(found)} hits): the distributions belong to other tokens"
        )


def assemble(commit: ShardCommit, row: int, num_tokens: int, bands: Sequence[Band]) -> Trace:
    """Put the first `num_tokens` tokens of one trace together from its bands."""
    parts = []
    missing = num_tokens
    for band in bands:
        first, last = band.token_ends[row], band.token_ends[row + 1]
        last = min(last, first + missing)
        missing -= last - first
        parts.append(
            (band, slice(first, last), slice(band.entry_ends[first], band.entry_ends[last]))
        )
        if missing == 0:
            break
    info = commit.traces[row]
    return Trace(
        trace_id=info.trace_id,
        token_ids=np.concatenate([band.token_ids[tokens] for band, tokens, _ in parts]),
        n_total=info.n_total,
        cot_start=info.cot_start,
        answer_start=info.answer_start,
        k=np.concatenate([band.k[tokens] for band, tokens, _ in parts]),
        top_ids=np.concatenate([band.top_ids[entries] for band, _, entries in parts]),
        top_logits=np.concatenate([band.top_logits[entries] for band, _, entries in parts]),
        tail_logit=np.concatenate([band.tail_logit[tokens] for band, tokens, _ in parts]),
        finish_reason=info.finish_reason,
        fields=info.fields,
    )
