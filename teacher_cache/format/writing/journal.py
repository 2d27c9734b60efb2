"""The journal: finished traces of one worker, one zstandard frame each, until they fill a shard.

The first frame holds the header's fingerprint. Bytes outside whole frames (at the end after a
crash, in the middle after a power cut) are left out and reported; every whole frame is kept.
"""

import errno
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from teacher_cache.format.codec import LOGIT_GRID, logit_codes
from teacher_cache.format.errors import CacheFormatError
from teacher_cache.format.files import fsync, naming, require_file
from teacher_cache.format.header import UNUSABLE_JSON
from teacher_cache.format.trace import OPTIONAL_COLUMNS, Trace

_READ_BYTES = 1 << 16
_FRAME_HEADER_BYTES = 18  # at most
_MAGIC = b"\x28\xb5\x2f\xfd"  # every zstandard frame begins with it
MAX_FRAME_BYTES = 2 << 30  # limit for one trace
_HEAD_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class FinishedTrace:
    """A trace on its way into a shard, with what its commit record adds."""

    trace: Trace
    source_hash: str
    num_clamped_tails: int = 0
    num_clamped_logits: int = 0
    messages: Mapping[str, Any] | None = None  # its prompt, if that was messages


class Journal:
    """An append-only file of finished traces."""

    def __init__(self, path: Path, header_fingerprint: str) -> None:
        """Open a journal for appending; a torn tail is cut off, a missing file is created.

        Raises:
            CacheFormatError: If it belongs to another capture.
        """
        self.path = path
        import zstandard  # imported here because reading a cache must not need it

        self._compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
        self.num_bytes = 0
        self.num_decoded_bytes = 0
        self.num_unsynced_bytes = 0
        for _, self.num_bytes, payload in _checked_frames(path, header_fingerprint):
            self.num_decoded_bytes += len(payload)
        self._file = path.open("ab", buffering=0)
        self._file.truncate(self.num_bytes)
        if self.num_bytes == 0:
            self._append(json.dumps({"header_fingerprint": header_fingerprint}).encode())
            self.sync()
            fsync(path.parent)

    def append(self, finished: FinishedTrace) -> None:
        """Write one trace; from then on it survives the process, and after `sync` the machine."""
        self._append(_encode(finished))

    def _append(self, payload: bytes) -> None:
        frame = self._compressor.compress(payload)
        with naming(self.path):
            try:
                rest = memoryview(frame)
                while rest:  # after a short write the next one raises the reason
                    num_written = self._file.write(rest)
                    if not num_written:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    rest = rest[num_written:]
            except OSError:
                self._file.truncate(self.num_bytes)  # earlier traces stay readable
                raise
        self.num_bytes += len(frame)
        self.num_unsynced_bytes += len(frame)
        self.num_decoded_bytes += len(payload)

    def sync(self) -> None:
        """Force everything appended to disk."""
        with naming(self.path):
            os.fsync(self._file.fileno())
        self.num_unsynced_bytes = 0

    def close(self) -> None:
        """Sync and close; the file is kept."""
        try:
            self.sync()
        finally:
            self._file.close()


def read_journal(path: Path, header_fingerprint: str) -> Iterator[FinishedTrace]:
    """Yield every whole trace of a journal, in the order of writing.

    Raises:
        CacheFormatError: If it belongs to another capture, or a whole frame is not a trace.
    """
    frames = _checked_frames(path, header_fingerprint)
    next(frames, None)
    for number, (_, _, payload) in enumerate(frames, start=1):
        try:
            yield _decode(payload)
        except (*UNUSABLE_JSON, struct.error) as error:
            raise CacheFormatError(f"{path}: frame {number} is not a trace: {error!r}") from error


def journal_damage(path: Path, header_fingerprint: str) -> list[tuple[int, int]]:
    """(start, end) of every run of bytes outside whole frames; the last may be a torn tail.

    Raises:
        CacheFormatError: If the journal belongs to another capture.
    """
    runs = []
    position = 0
    for start, end, _ in _checked_frames(path, header_fingerprint):
        runs.append((position, start))
        position = end
    runs.append((position, path.stat().st_size))
    return [run for run in runs if run[0] < run[1]]


def _checked_frames(path: Path, header_fingerprint: str) -> Iterator[tuple[int, int, bytes]]:
    """Yield every whole frame of this capture's journal."""
    frames = _frames(path)
    first = next(frames, None)
    if first is None:
        return  # interrupted before the first frame was whole: empty
    start, _, payload = first
    if start > 0:
        raise CacheFormatError(
            f"{path}: the first {start} bytes are damaged, so whether the traces after them "
            "belong to this capture is unknown. Move the file away to capture them again."
        )
    try:
        found = json.loads(payload)["header_fingerprint"]
    except UNUSABLE_JSON as error:
        raise CacheFormatError(f"{path}: not a journal: {error!r}") from error
    if found != header_fingerprint:
        raise CacheFormatError(
            f"{path}: expected a journal of capture {header_fingerprint}, got {found}; "
            "it belongs to another capture, so write to another folder"
        )
    yield first
    yield from frames


def _frames(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(start, end, content) of every whole frame; damaged bytes are skipped to the next one."""
    data = b""
    if path.exists():
        require_file(path)
        data = path.read_bytes()
    position = 0
    while (start := data.find(_MAGIC, position)) >= 0:
        found = _whole_frame(data, start)
        if found is None:
            position = start + 1
        else:
            position = found[0]
            yield start, *found


def _whole_frame(data: bytes, start: int) -> tuple[int, bytes] | None:
    """(end, content) of the frame that begins at `start`; None if it is damaged or torn."""
    import zstandard

    try:
        declared = zstandard.frame_content_size(data[start : start + _FRAME_HEADER_BYTES])
        if not 0 <= declared <= MAX_FRAME_BYTES:
            return None  # not ours: its decompressed size is unbounded
        decompressor = zstandard.ZstdDecompressor().decompressobj()
        parts = []
        position = start
        while not decompressor.eof:
            chunk = data[position : position + _READ_BYTES]
            if not chunk:
                return None
            parts.append(decompressor.decompress(chunk))
            position += len(chunk)
    except zstandard.ZstdError:
        return None
    return position - len(decompressor.unused_data), b"".join(parts)


def _encode(finished: FinishedTrace) -> bytes:
    trace = finished.trace
    head = {
        "trace_id": trace.trace_id,
        "n_total": trace.n_total,
        "num_tokens": len(trace.token_ids),
        "num_entries": trace.num_entries,
        "cot_start": trace.cot_start,
        "answer_start": trace.answer_start,
        "finish_reason": trace.finish_reason,
        "fields": trace.fields,
        "source_hash": finished.source_hash,
        "num_clamped_tails": finished.num_clamped_tails,
        "num_clamped_logits": finished.num_clamped_logits,
    }
    if finished.messages is not None:
        head["messages"] = finished.messages
    optional = [name for name in OPTIONAL_COLUMNS if getattr(trace, name) is not None]
    if optional:
        head["optional_columns"] = optional
    text = json.dumps(head).encode()
    columns = (
        trace.token_ids.astype("<i4"),
        trace.k,
        trace.top_ids.astype("<i4"),
        logit_codes(trace.top_logits),
        trace.tail_logit.astype("<f4"),
        *(getattr(trace, name).astype("<f4") for name in optional),
    )
    return b"".join([_HEAD_LENGTH.pack(len(text)), text, *(c.tobytes() for c in columns)])


def _decode(payload: bytes) -> FinishedTrace:
    (length,) = _HEAD_LENGTH.unpack_from(payload)
    position = _HEAD_LENGTH.size + length
    head: dict[str, Any] = json.loads(payload[_HEAD_LENGTH.size : position])
    num_tokens, num_entries = head.pop("num_tokens"), head.pop("num_entries")
    optional = head.pop("optional_columns", [])
    kinds = [
        ("<i4", num_tokens), ("u1", num_tokens), ("<i4", num_entries), ("u1", num_entries),
        ("<f4", num_tokens), *[("<f4", num_tokens)] * len(optional),
    ]  # fmt: skip
    expected = sum(np.dtype(kind).itemsize * count for kind, count in kinds)
    if len(payload) - position != expected or num_tokens < 1:
        raise ValueError(f"{len(payload) - position} bytes for {num_tokens} tokens")
    columns = []
    for kind, count in kinds:
        columns.append(np.frombuffer(payload, kind, count, position))
        position += columns[-1].nbytes
    token_ids, k, top_ids, codes, tail_logit, *others = columns
    counts = {name: head.pop(name) for name in ("num_clamped_tails", "num_clamped_logits")}
    source_hash, messages = head.pop("source_hash"), head.pop("messages", None)
    head |= zip(optional, others, strict=True)
    trace = Trace(
        token_ids=token_ids,
        k=k,
        top_ids=top_ids,
        top_logits=LOGIT_GRID[codes],
        tail_logit=tail_logit,
        **head,
    )
    trace.validate()
    return FinishedTrace(trace, source_hash, **counts, messages=messages)
