"""Bytes of a shard -> checked numpy arrays -> traces."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from teacher_cache.format.commit import ShardCommit
from teacher_cache.format.errors import CacheFormatError
from teacher_cache.format.header import CacheHeader
from teacher_cache.format.schema import check_schema
from teacher_cache.format.span import band_start
from teacher_cache.format.trace import Trace

_MAGIC_BYTES = 8  # of an IPC file; what follows is an IPC stream


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
    try:
        options = pa.ipc.IpcReadOptions(use_threads=False)
        with pa.ipc.open_stream(data.slice(_MAGIC_BYTES), options=options) as stream:
            check_schema(stream.schema, header, where)
            for band in range(num_bands):
                batch = stream.read_next_batch()
                batch.validate(full=True)  # indices inside dictionaries, offsets inside buffers
                bands.append(_decode_batch(batch, band, commit, header, where))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, StopIteration) as error:
        raise CacheFormatError(f"{where}: not readable as Arrow: {error}") from error
    return bands


def _decode_batch(
    batch: pa.RecordBatch, band: int, commit: ShardCommit, header: CacheHeader, where: str
) -> Band:
    where = f"{where}: band {band}"
    totals = [trace.n_total for trace in commit.traces]
    starts = np.array([band_start(n, band, header.num_bands) for n in totals], np.int64)
    ends = np.array([band_start(n, band + 1, header.num_bands) for n in totals], np.int64)
    num_tokens = ends - starts
    expected: dict[str, NDArray[Any]] = {
        "band": np.full(len(totals), band),
        "start": starts,
        "n_total": np.array(totals),
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
    entry_ends = np.concatenate([[0], np.cumsum(k, dtype=np.int64)])
    num_entries = entry_ends[token_ends[1:]] - entry_ends[token_ends[:-1]]
    for name, found, right in (
        ("k", lengths, num_tokens),
        ("token_ids", token_lengths, num_tokens),
        ("tail_logit", tail_lengths, num_tokens),
        ("top_ids", id_lengths, num_entries),
        ("top_logits", logit_lengths, num_entries),
    ):
        if not np.array_equal(found, right):
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
        dictionary = values.dictionary
        if dictionary.null_count:
            raise CacheFormatError(f"{where}: the dictionary of column {name!r} holds nulls")
        return dictionary.to_numpy()[values.indices.to_numpy()], lengths
    return values.to_numpy(), lengths


def _check_values(band: Band, vocab_size: int, where: str) -> None:
    for name, ids in (("token_ids", band.token_ids), ("top_ids", band.top_ids)):
        if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
            raise CacheFormatError(f"{where}: {name} outside the vocabulary of {vocab_size}")
    if not (np.isfinite(band.top_logits).all() and (band.top_logits <= 0).all()):
        raise CacheFormatError(f"{where}: top_logits must be finite and at most 0")
    if not np.isfinite(band.tail_logit).all():
        raise CacheFormatError(f"{where}: tail_logit must be finite")
    num_realised = np.count_nonzero(band.top_ids == np.repeat(band.token_ids, band.k))
    if num_realised != np.count_nonzero(band.k):
        raise CacheFormatError(
            f"{where}: {np.count_nonzero(band.k)} tokens have entries, but {num_realised} of "
            "these hold the token itself: the distributions belong to other tokens"
        )


def assemble(commit: ShardCommit, row: int, num_tokens: int, bands: Sequence[Band]) -> Trace:
    """Put the first `num_tokens` tokens of one trace together from its bands."""
    columns: dict[str, list[NDArray[Any]]] = {
        name: [] for name in ("token_ids", "k", "top_ids", "top_logits", "tail_logit")
    }
    missing = num_tokens
    for band in bands:
        first = band.token_ends[row]
        last = min(band.token_ends[row + 1], first + missing)
        missing -= int(last - first)
        tokens = slice(first, last)
        entries = slice(band.entry_ends[first], band.entry_ends[last])
        for name in ("token_ids", "k", "tail_logit"):
            columns[name].append(getattr(band, name)[tokens])
        for name in ("top_ids", "top_logits"):
            columns[name].append(getattr(band, name)[entries])
        if missing == 0:
            break
    info = commit.traces[row]
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Trace(
        trace_id=info.trace_id,
        n_total=info.n_total,
        cot_start=info.cot_start,
        answer_start=info.answer_start,
        finish_reason=info.finish_reason,
        fields=info.fields,
        **arrays,
    )
