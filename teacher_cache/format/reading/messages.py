"""Messages that traces answer, read from the small file beside their shard."""

import hashlib
import json
import struct
from typing import Any

import pyarrow as pa

from teacher_cache.format.commit import ShardCommit
from teacher_cache.format.errors import CacheFormatError
from teacher_cache.format.header import UNUSABLE_JSON
from teacher_cache.format.reading.ipc import declared_bytes
from teacher_cache.format.records import messages_file
from teacher_cache.format.store import Store

MAX_MESSAGES_BYTES = 1 << 30  # of one file, decompressed
_MAGIC_BYTES = 8  # before the stream in an IPC file


def read_messages(store: Store, commit: ShardCommit) -> dict[str, Any]:
    """trace_id -> messages, for every trace of a shard whose prompt was messages.

    Raises:
        CacheFormatError: If the file is missing or damaged.
    """
    if commit.messages is None:
        return {}
    file = messages_file(commit.name)
    where = f"{store.where}: {file}"
    try:
        data = store.read(file)
    except FileNotFoundError as error:
        raise CacheFormatError(
            f"{where} is missing although the shard's commit record names it. Restore it "
            "from a copy"
        ) from error
    is_whole = len(data) == commit.messages.size_bytes
    if not is_whole or hashlib.sha256(data).hexdigest() != commit.messages.sha256:
        raise CacheFormatError(f"{where}: differs from the committed file; it is damaged")
    try:
        num_bytes = declared_bytes(memoryview(data)[_MAGIC_BYTES:], num_record_batches=1)
        if num_bytes > MAX_MESSAGES_BYTES:
            raise CacheFormatError(f"{where}: declares {num_bytes:,} bytes of text")
        stream = pa.ipc.open_stream(pa.py_buffer(data)[_MAGIC_BYTES:])
        batch = stream.read_next_batch()
        batch.validate(full=True)
        names, texts = batch["trace_id"].to_pylist(), batch["messages"].to_pylist()
        return {str(name): json.loads(text) for name, text in zip(names, texts, strict=True)}
    except (pa.ArrowException, struct.error, StopIteration, *UNUSABLE_JSON) as error:
        raise CacheFormatError(f"{where}: not a table of messages: {error!r}") from error
