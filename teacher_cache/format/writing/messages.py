"""Messages that traces answer, written into a small file beside their shard.

A chat template turns messages into tokens, but not back: with the messages, a
trace can be rendered again in another template.
"""

import json
from collections.abc import Sequence

import pyarrow as pa

from teacher_cache.format.writing.journal import FinishedTrace

_SCHEMA = pa.schema(
    [pa.field("trace_id", pa.string(), False), pa.field("messages", pa.string(), False)]
)
_ZSTD_LEVEL = 3  # for text 5 % smaller than level 1


def encode_messages(finished: Sequence[FinishedTrace]) -> bytes:
    """An Arrow IPC file of trace ids and JSON texts, in one record batch, or no bytes."""
    asked = [(item.trace.trace_id, item.messages) for item in finished if item.messages is not None]
    if not asked:
        return b""
    texts = [json.dumps(messages, ensure_ascii=False, sort_keys=True) for _, messages in asked]
    batch = pa.record_batch([[name for name, _ in asked], texts], schema=_SCHEMA)
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=_ZSTD_LEVEL))
    with pa.ipc.new_file(sink, _SCHEMA, options=options) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())
