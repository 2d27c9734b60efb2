"""Memory that an IPC stream would take, from its declared sizes, before decompression.

pyarrow allocates a compressed buffer's declared length before it looks at the bytes, so
a few untrusted bytes could request any amount. The messages' flatbuffers are parsed here for
that one number; pyarrow checks everything else.
"""

import struct
from dataclasses import dataclass

_CONTINUATION = 0xFFFFFFFF  # precedes every message
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
_BUFFER_BYTES = 16  # offset and length


@dataclass(frozen=True)
class _Table:
    """A flatbuffers table: a table of offsets before it locates its fields."""

    data: memoryview
    position: int

    @classmethod
    def root(cls, data: memoryview) -> "_Table":
        return cls(data, _unsigned(data, 0))

    def field(self, number: int) -> int | None:
        """Position of a field; None if it is left at its default."""
        vtable = self.position - int(struct.unpack_from("<i", self.data, self.position)[0])
        if vtable < 0:
            raise ValueError("a message's field table lies outside it")
        (size,) = struct.unpack_from("<H", self.data, vtable)
        if 4 + 2 * number >= size:
            return None
        (offset,) = struct.unpack_from("<H", self.data, vtable + 4 + 2 * number)
        return self.position + offset if offset else None

    def table(self, number: int) -> "_Table | None":
        place = self.field(number)
        return None if place is None else _Table(self.data, place + _unsigned(self.data, place))


def _unsigned(data: memoryview, position: int) -> int:
    return int(struct.unpack_from("<I", data, position)[0])


def declared_bytes(stream: memoryview, num_record_batches: int) -> int:
    """Bytes that the first messages of an IPC stream take once decompressed.

    Args:
        stream: The stream from its schema on.
        num_record_batches: Count messages up to this record batch, dictionaries included.

    Raises:
        ValueError, struct.error: If the stream is not a valid IPC stream, ends early, or
            changes a dictionary after its first record batch.
    """
    position = total = num_seen = 0
    while num_seen < num_record_batches:
        marker, size = struct.unpack_from("<Ii", stream, position)
        if marker != _CONTINUATION or size <= 0:
            raise ValueError(f"expected an IPC message at byte {position} of the stream")
        position += 8
        message = _Table.root(stream[position : position + size])
        position += size
        place, kind_place = message.field(3), message.field(1)
        length = 0 if place is None else int(struct.unpack_from("<q", message.data, place)[0])
        if not 0 <= length <= len(stream) - position:
            raise ValueError(f"a message declares {length} bytes, {len(stream) - position} follow")
        kind = 0 if kind_place is None else message.data[kind_place]
        batch = message.table(2)
        if kind == _DICTIONARY_BATCH and num_seen:
            raise ValueError("a dictionary follows the first record batch")
        if kind == _DICTIONARY_BATCH and batch is not None:
            batch = batch.table(1)
        if kind in (_DICTIONARY_BATCH, _RECORD_BATCH) and batch is not None:
            total += _decompressed(batch, stream[position : position + length])
        num_seen += kind == _RECORD_BATCH
        position += length
    return total


def _decompressed(batch: _Table, body: memoryview) -> int:
    buffers = batch.field(2)
    if batch.field(3) is None or buffers is None:
        return 0  # not compressed: used in place
    place = buffers + _unsigned(batch.data, buffers)
    total = 0
    for number in range(_unsigned(batch.data, place)):
        offset, length = struct.unpack_from("<qq", batch.data, place + 4 + number * _BUFFER_BYTES)
        if length == 0:
            continue
        if offset < 0:
            raise ValueError("a buffer lies outside its message")
        (declared,) = struct.unpack_from("<q", body, offset)
        total += max(0, declared)  # -1: this one is not compressed
    return total
