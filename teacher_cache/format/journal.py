"""The journal: finished traces of one worker, one zstandard frame each, until they fill a shard.

The first frame holds the header's fingerprint; a frame that was being written when the process
died is cut off on restart, everything before it is kept.
"""

import errno
import json
import logging
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from teacher_cache.format.codec import LOGIT_GRID, logit_codes
from teacher_cache.format.errors import CacheFormatError
from teacher_cache.format.header import UNUSABLE_JSON
from teacher_cache.format.trace import Trace

logger = logging.getLogger(__name__)

_READ_BYTES = 1 << 16
_FRAME_HEADER_BYTES = 18  # at most
MAX_FRAME_BYTES = 2 << 30  # of one trace
_HEAD_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class FinishedTrace:
    """A trace on its way into a shard, with what its commit record will say beside it."""

    trace: Trace
    source_hash: str
    num_clamped_tails: int = 0
    num_clamped_logits: int = 0


class Journal:
    """An append-only file of finished traces."""

    def __init__(self, path: Path, header_fingerprint: str) -> None:
        """Open a journal for appending; a torn tail is cut off, an absent file is made.

        Raises:
            CacheFormatError: If it belongs to another capture.
        """
        self.path = path
        import zstandard  # here, because reading a cache must not need it

        self._compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
        self.num_bytes = whole_frames_bytes(path, header_fingerprint)
        self._file = path.open("ab", buffering=0)
        size = os.fstat(self._file.fileno()).st_size
        if size > self.num_bytes:
            logger.warning("%s: cut off a torn tail of %d bytes", path, size - self.num_bytes)
            self._file.truncate(self.num_bytes)
        if self.num_bytes == 0:
            self._append(json.dumps({"header_fingerprint": header_fingerprint}).encode())
            self.sync()

    def append(self, finished: FinishedTrace) -> None:
        """Write one trace; it survives the process from here on, and the machine after `sync`."""
        self._append(_encode(finished))

    def _append(self, payload: bytes) -> None:
        frame = self._compressor.compress(payload)
        try:
            if self._file.write(frame) != len(frame):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError:
            self._file.truncate(self.num_bytes)  # what was appended before stays readable
            raise
        self.num_bytes += len(frame)

    def sync(self) -> None:
        """Force everything appended onto the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close; the file stays."""
        self.sync()
        self._file.close()


def read_journal(path: Path, header_fingerprint: str) -> Iterator[FinishedTrace]:
    """Every whole trace of a journal, in the order of writing; a torn tail is left out.

    Raises:
        CacheFormatError: If it belongs to another capture, or a whole frame holds nonsense.
    """
    frames = _frames(path)
    _check_first(next(frames, None), header_fingerprint, path)
    for number, (_, payload) in enumerate(frames, start=1):
        try:
            yield _decode(payload)
        except (*UNUSABLE_JSON, struct.error) as error:
            raise CacheFormatError(f"{path}: frame {number} is not a trace: {error!r}") from error


def whole_frames_bytes(path: Path, header_fingerprint: str) -> int:
    """Bytes of a journal up to its torn tail; 0 where there is no file.

    Raises:
        CacheFormatError: If it belongs to another capture.
    """
    if not path.exists():
        return 0
    end = 0
    for number, (end, payload) in enumerate(_frames(path)):
        if number == 0:
            _check_first((end, payload), header_fingerprint, path)
    return end


def _check_first(frame: tuple[int, bytes] | None, header_fingerprint: str, path: Path) -> None:
    if frame is None:
        return  # died before the first frame was whole: an empty journal
    try:
        found = json.loads(frame[1])["header_fingerprint"]
    except UNUSABLE_JSON as error:
        raise CacheFormatError(f"{path}: not a journal: {error!r}") from error
    if found != header_fingerprint:
        raise CacheFormatError(
            f"{path}: expected a journal of capture {header_fingerprint}, got {found}; "
            "it belongs to another capture, so write to another folder"
        )


def _frames(path: Path) -> Iterator[tuple[int, bytes]]:
    """(end offset, content) of every whole frame, up to the first that is not."""
    import zstandard

    with path.open("rb") as file:
        position = 0  # in the file, of the first byte not yet given to a decompressor
        chunk = b""
        while True:
            chunk += file.read(_FRAME_HEADER_BYTES)  # so that the frame's header is in it
            try:
                declared = zstandard.frame_content_size(chunk)
            except zstandard.ZstdError:
                return
            if not 0 <= declared <= MAX_FRAME_BYTES:
                return  # not written here: what it decompresses to would not be bounded
            decompressor = zstandard.ZstdDecompressor().decompressobj()
            parts = []
            while not decompressor.eof:
                chunk = chunk or file.read(_READ_BYTES)
                if not chunk:
                    return
                try:
                    parts.append(decompressor.decompress(chunk))
                except zstandard.ZstdError:
                    return
                position += len(chunk)
                chunk = b""
            chunk = decompressor.unused_data
            position -= len(chunk)
            yield position, b"".join(parts)


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
    text = json.dumps(head).encode()
    columns = (
        trace.token_ids.astype("<i4"),
        trace.k,
        trace.top_ids.astype("<i4"),
        logit_codes(trace.top_logits),
        trace.tail_logit.astype("<f4"),
    )
    return b"".join([_HEAD_LENGTH.pack(len(text)), text, *(c.tobytes() for c in columns)])


def _decode(payload: bytes) -> FinishedTrace:
    (length,) = _HEAD_LENGTH.unpack_from(payload)
    position = _HEAD_LENGTH.size + length
    head: dict[str, Any] = json.loads(payload[_HEAD_LENGTH.size : position])
    num_tokens, num_entries = head.pop("num_tokens"), head.pop("num_entries")
    if len(payload) - position != 9 * num_tokens + 5 * num_entries or num_tokens < 1:
        raise ValueError(f"{len(payload) - position} bytes for {num_tokens} tokens")
    columns = []
    for kind, count in (
        ("<i4", num_tokens), ("u1", num_tokens), ("<i4", num_entries), ("u1", num_entries),
        ("<f4", num_tokens),
    ):  # fmt: skip
        columns.append(np.frombuffer(payload, kind, count, position))
        position += columns[-1].nbytes
    token_ids, k, top_ids, codes, tail_logit = columns
    counts = {name: head.pop(name) for name in ("num_clamped_tails", "num_clamped_logits")}
    source_hash = head.pop("source_hash")
    trace = Trace(
        token_ids=token_ids,
        k=k,
        top_ids=top_ids,
        top_logits=LOGIT_GRID[codes],
        tail_logit=tail_logit,
        **head,
    )
    trace.validate()
    return FinishedTrace(trace, source_hash, **counts)
