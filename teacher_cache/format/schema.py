"""The Arrow schema of a shard. SPEC.md says what each column means."""

import json

import pyarrow as pa

from teacher_cache.format.errors import CacheFormatError
from teacher_cache.format.header import FORMAT_NAME, FORMAT_VERSION, CacheHeader

METADATA_KEY = b"leadspan"

# Most shards have at most 65,536 distinct kept ids; others need wider indices.
MAX_NARROW_IDS = 1 << 16


def shard_schema(header: CacheHeader, *, wide_ids: bool) -> pa.Schema:
    """Schema of a shard of a cache with this header, with provenance in its metadata."""
    id_index = pa.uint32() if wide_ids else pa.uint16()
    columns = {
        "trace_id": pa.dictionary(pa.int32(), pa.string()),
        "band": pa.uint8(),
        "start": pa.int32(),
        "n_total": pa.int32(),
        "cot_start": pa.int32(),
        "answer_start": pa.int32(),
        "token_ids": pa.list_(pa.int32()),
        "k": pa.list_(pa.uint8()),
        "top_ids": pa.list_(pa.dictionary(id_index, pa.int32())),
        "top_logits": pa.list_(pa.dictionary(pa.uint8(), pa.float32())),
        "tail_logit": pa.list_(pa.float32()),
    }
    columns |= {name: pa.list_(pa.float32()) for name in header.optional_columns}
    about = {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "header": header.to_json(),
    }
    return pa.schema(
        [pa.field(name, kind) for name, kind in columns.items()],
        metadata={METADATA_KEY: json.dumps(about, sort_keys=True)},
    )


def check_schema(found: pa.Schema, header: CacheHeader, where: str) -> None:
    """Check that a shard has every column, of the right type; unknown columns are ignored.

    Raises:
        CacheFormatError: Names the column, its type and the type expected.
    """
    narrow, wide = (shard_schema(header, wide_ids=wide) for wide in (False, True))
    for field in narrow:
        position = found.get_field_index(field.name)  # -1 if missing or duplicate
        if position < 0:
            raise CacheFormatError(f"{where}: expected one column {field.name!r}, not found")
        kind = found.field(position).type
        if kind not in (field.type, wide.field(field.name).type):
            raise CacheFormatError(
                f"{where}: expected column {field.name!r} of type {field.type}, got {kind}"
            )
