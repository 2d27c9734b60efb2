"""Bytes of a shard -> checked numpy arrays -> traces."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from teacher_cache.format.bands import band_start
from teacher_cache.format.commit import ShardCommit
from teacher_cache.format.errors import CacheFormatError
from teacher_cache.format.header import CacheHeader
from teacher_cache.format.ragged import entry_offsets
from teacher_cache.format.reading.ipc import declared_bytes
from teacher_cache.format.schema import check_schema
from teacher_cache.format.trace import Trace

MAGIC_BYTES = 8  # of an IPC file; an IPC stream follows
MAX_DECLARED_BYTES = (
    2 << 30
)  # of a shard's buffers: limits what an untrusted file can make a reader allocate


@dataclass(frozen=True)
class Coded:
    """Values of a dictionary column: `dictionary[codes]`, every code inside the dictionary."""

    codes: NDArray[np.unsignedinteger]  # [entries]
    dictionary: NDArray[Any]

    def values(self, codes: NDArray[np.unsignedinteger]) -> NDArray[Any]:
        """Values of some of the codes."""
        # Clipping changes nothing here and avoids numpy's own, slower check.
        return self.dictionary.take(codes, mode="clip")


@dataclass(frozen=True)
class Band:
    """One record batch, flat; row r's tokens are token_ends[r]:token_ends[r+1]."""

    token_ends: list[int]  # [rows + 1]
    row_ends: list[int]  # [rows + 1], likewise for its entries
    entry_ends: NDArray[np.int64]  # [tokens + 1], likewise for each token's entries
    token_ids: NDArray[np.int32]
    k: NDArray[np.uint8]
    top_ids: NDArray[np.int32]
    top_logits: Coded
    tail_logit: NDArray[np.float32]
    optional: Mapping[str, NDArray[np.float32]]  # columns that only some caches have, by name


def decode_bands(
    data: pa.Buffer, commit: ShardCommit, num_bands: int, header: CacheHeader, where: str
) -> list[Band]:
    """Decode the leading bands of a shard and check them against the format and its record.

    Args:
        data: Leading bytes of the file, at least to the end of these bands.
        commit: The shard's commit record.
        num_bands: Number of leading bands.
        header: Header of the cache.
        where: Name of the shard, for errors.

    Raises:
        CacheFormatError: If anything contradicts the format or the record.
    """
    if num_bands == 0:
        return []
    bands: list[Band] = []
    try:
        expected = _Expected.of(commit, header)
        stream_bytes = data.slice(MAGIC_BYTES)
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
                batch.validate()  # checks that buffers are large enough for the columns
                if band == 0:
                    dictionaries = _dictionaries(batch, header, where)
                bands.append(
                    _decode_batch(
                        batch, band, expected, dictionaries, header, f"{where}: band {band}"
                    )
                )
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


@dataclass(frozen=True)
class _Expected:
    """Facts about a shard's rows from the commit record."""

    trace_ids: pa.Array
    held: NDArray[np.int64]  # tokens of each trace in this cache
    columns: Mapping[str, NDArray[np.int64]]  # the same in every band

    @classmethod
    def of(cls, commit: ShardCommit, header: CacheHeader) -> "_Expected":
        names = ("n_total", "cot_start", "answer_start")
        return cls(
            pa.array([trace.trace_id for trace in commit.traces], pa.string()),
            np.array([header.num_held(t.n_total, t.n_held) for t in commit.traces], np.int64),
            {name: np.array([getattr(t, name) for t in commit.traces]) for name in names},
        )


def _dictionaries(batch: pa.RecordBatch, header: CacheHeader, where: str) -> dict[str, pa.Array]:
    """Checked values that the entries point to, the same in every band of a shard."""
    found = {name: batch[name].values.dictionary for name in ("top_ids", "top_logits")}
    for name, dictionary in found.items():
        dictionary.validate(full=True)
        if dictionary.null_count:
            raise CacheFormatError(f"{where}: the dictionary of column {name!r} holds nulls")
    _check_range(found["top_ids"].to_numpy(), "top_ids", header.vocab_size, where)
    if not np.isfinite(found["top_logits"].to_numpy()).all():
        raise CacheFormatError(f"{where}: top_logits must be finite")
    return found


def _decode_batch(
    batch: pa.RecordBatch,
    band: int,
    expected: _Expected,
    dictionaries: Mapping[str, pa.Array],
    header: CacheHeader,
    where: str,
) -> Band:
    starts = band_start(expected.held, band, header.num_bands)
    num_tokens = band_start(expected.held, band + 1, header.num_bands) - starts
    batch["trace_id"].validate(full=True)
    if not batch["trace_id"].dictionary_decode().equals(expected.trace_ids):
        raise CacheFormatError(f"{where}: the trace ids differ from the commit record")
    of_band = {"band": np.full(len(starts), band), "start": starts}
    for name, values in {**of_band, **expected.columns}.items():
        if not np.array_equal(_plain(batch, name, where), values):
            raise CacheFormatError(f"{where}: column {name!r} differs from the commit record")
    k, lengths = _flat(batch, "k", where)
    token_ids, token_lengths = _flat(batch, "token_ids", where)
    tail_logit, tail_lengths = _flat(batch, "tail_logit", where)
    id_codes, id_lengths = _codes(batch, "top_ids", dictionaries, where)
    logit_codes, logit_lengths = _codes(batch, "top_logits", dictionaries, where)
    per_token = [lengths, token_lengths, tail_lengths]
    optional: dict[str, NDArray[np.float32]] = {}
    for name in header.optional_columns:
        optional[name], num_values = _flat(batch, name, where)
        per_token.append(num_values)
        _check_logprobs(name, optional[name], where)
    if not all(np.array_equal(found, num_tokens) for found in per_token):
        raise CacheFormatError(f"{where}: the lists of its columns have wrong lengths")
    token_ends, entry_ends = entry_offsets(num_tokens), entry_offsets(k)
    row_ends = entry_ends[token_ends]
    for name, found in (("top_ids", id_lengths), ("top_logits", logit_lengths)):
        if not np.array_equal(found, np.diff(row_ends)):
            raise CacheFormatError(f"{where}: the lists of column {name!r} have wrong lengths")
    _check_range(token_ids, "token_ids", header.vocab_size, where)
    if not np.isfinite(tail_logit).all():
        raise CacheFormatError(f"{where}: tail_logit must be finite")
    top_logits = Coded(logit_codes.to_numpy(), dictionaries["top_logits"].to_numpy())
    _check_logits(top_logits, entry_ends[:-1][k > 0], where)
    top_ids = pc.take(dictionaries["top_ids"], id_codes, boundscheck=False).to_numpy()
    wrong = _without_itself(token_ids, k, top_ids, entry_ends)
    if wrong is not None:
        row = int(np.searchsorted(token_ends, wrong, side="right")) - 1
        raise CacheFormatError(
            f"{where}: token {starts[row] + wrong - token_ends[row]} of trace "
            f"{expected.trace_ids[row].as_py()!r} has entries but is not exactly once among them: "
            "the distributions belong to other tokens"
        )
    return Band(
        token_ends=token_ends.tolist(),
        row_ends=row_ends.tolist(),
        entry_ends=entry_ends,
        token_ids=token_ids,
        k=k,
        top_ids=top_ids,
        top_logits=top_logits,
        tail_logit=tail_logit,
        optional=optional,
    )


def _plain(batch: pa.RecordBatch, name: str, where: str) -> NDArray[Any]:
    column = batch[name]
    column.validate(full=True)
    if column.null_count:
        raise CacheFormatError(f"{where}: column {name!r} holds nulls")
    values: NDArray[Any] = column.to_numpy()
    return values


def _flat(batch: pa.RecordBatch, name: str, where: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Values of a list column and the length of each list."""
    column = batch[name]
    column.validate(full=True)
    values = column.flatten()
    if column.null_count or values.null_count:
        raise CacheFormatError(f"{where}: column {name!r} holds nulls")
    return values.to_numpy(), column.value_lengths().to_numpy().astype(np.int64)


def _codes(
    batch: pa.RecordBatch, name: str, dictionaries: Mapping[str, pa.Array], where: str
) -> tuple[pa.Array, NDArray[np.int64]]:
    """Codes of a column of lists from a dictionary, and the length of each list.

    Checks what `validate(full=True)` would check, ten times faster.
    """
    column = batch[name]
    values, offsets = column.values, column.offsets.to_numpy()
    lengths = np.diff(offsets)
    if offsets[0] < 0 or (lengths < 0).any() or offsets[-1] > len(values):
        raise CacheFormatError(f"{where}: the lists of column {name!r} lie outside it")
    values = values.slice(offsets[0], offsets[-1] - offsets[0])
    if column.null_count or values.null_count:
        raise CacheFormatError(f"{where}: column {name!r} holds nulls")
    codes = values.indices
    if len(codes) and codes.to_numpy().max() >= len(dictionaries[name]):
        raise CacheFormatError(f"{where}: column {name!r} points outside its dictionary")
    return codes, lengths.astype(np.int64)


def _check_range(ids: NDArray[np.int32], name: str, vocab_size: int, where: str) -> None:
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        raise CacheFormatError(f"{where}: {name} outside the vocabulary of {vocab_size}")


def _check_logits(logits: Coded, starts: NDArray[np.int64], where: str) -> None:
    grid, codes = logits.dictionary, logits.codes
    # On a falling grid codes rise as values fall, and take a quarter of the bytes.
    rises = (
        codes[1:] < codes[:-1]
        if (grid[1:] < grid[:-1]).all()
        else np.diff(logits.values(codes)) > 0
    )
    rises[starts[1:] - 1] = False  # from the last entry of a token to the first of the next
    if rises.any():
        raise CacheFormatError(f"{where}: top_logits must not rise within a token")
    if logits.values(codes[starts]).any():
        raise CacheFormatError(f"{where}: the first top_logits of a token must be 0")


def _check_logprobs(name: str, logprob: NDArray[np.float32], where: str) -> None:
    known = logprob[~np.isnan(logprob)]
    is_chunks = name == "chunk_logprob"
    if not (np.isfinite(known).all() and ((known <= 0) | (is_chunks & (known == 1))).all()):
        values = "NaN, 1," if is_chunks else "NaN"
        raise CacheFormatError(f"{where}: {name} must be {values} or finite and at most 0")


def _without_itself(
    token_ids: NDArray[np.int32],
    k: NDArray[np.uint8],
    top_ids: NDArray[np.int32],
    entry_ends: NDArray[np.int64],
) -> int | None:
    """The first token with entries not exactly once among them; a capture off by one has some."""
    found = np.flatnonzero(top_ids == np.repeat(token_ids, k))
    ends = entry_ends[1:][k > 0]
    # If the i-th token with entries does not hold the i-th hit, a token has none or two.
    if len(found) == len(ends) and (found < ends).all() and (found[1:] >= ends[:-1]).all():
        return None
    hits = np.histogram(found, entry_ends)[0]
    return int(np.flatnonzero((k > 0) & (hits != 1))[0])


def assemble(
    commit: ShardCommit, row: int, num_tokens: int, bands: Sequence[Band], where: str
) -> Trace:
    """Assemble the first `num_tokens` tokens of one trace from its bands.

    Raises:
        CacheFormatError: If the distributions belong to other tokens.
    """
    parts = []
    missing = num_tokens
    for band in bands:
        first, last = band.token_ends[row], band.token_ends[row + 1]
        first_entry, last_entry = band.row_ends[row], band.row_ends[row + 1]
        if last - first >= missing:
            last = first + missing
            last_entry = int(band.entry_ends[last])
        missing -= last - first
        parts.append((band, slice(first, last), slice(first_entry, last_entry)))
        if missing == 0:
            break
    info = commit.traces[row]
    token_ids = np.concatenate([band.token_ids[tokens] for band, tokens, _ in parts])
    k = np.concatenate([band.k[tokens] for band, tokens, _ in parts])
    logit_codes = np.concatenate([band.top_logits.codes[entries] for band, _, entries in parts])
    return Trace(
        trace_id=info.trace_id,
        token_ids=token_ids,
        n_total=info.n_total,
        cot_start=info.cot_start,
        answer_start=info.answer_start,
        k=k,
        top_ids=np.concatenate([band.top_ids[entries] for band, _, entries in parts]),
        top_logits=bands[0].top_logits.values(logit_codes),
        tail_logit=np.concatenate([band.tail_logit[tokens] for band, tokens, _ in parts]),
        finish_reason=info.finish_reason,
        fields=info.fields,
        **{
            name: np.concatenate([band.optional[name][tokens] for band, tokens, _ in parts])
            for name in bands[0].optional
        },
    )
