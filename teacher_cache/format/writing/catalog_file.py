"""Writing `catalog.parquet`, a table that DuckDB, polars and pandas read as it is."""

import hashlib
import io

import pyarrow.parquet as pq

from teacher_cache.format.catalog import CATALOG_FILE, Catalog
from teacher_cache.format.catalog_fields import with_typed_fields
from teacher_cache.format.commit import FileDigest
from teacher_cache.format.store import Store

_ROW_GROUP_ROWS = 1 << 17  # few enough to skip groups in, enough to compress well


def publish_catalog(store: Store, catalog: Catalog) -> FileDigest:
    """Write the file, before the seal that vouches for it; returns what the seal says of it.

    Raises:
        OSError: If it cannot be written.
    """
    data = encode_catalog(catalog)
    store.publish(CATALOG_FILE, data)
    return FileDigest(len(data), hashlib.sha256(data).hexdigest())


def encode_catalog(catalog: Catalog) -> bytes:
    """The file's content, the user's fields in columns where their values have one type."""
    sink = io.BytesIO()
    table = with_typed_fields(catalog.table())
    pq.write_table(table, sink, compression="zstd", row_group_size=_ROW_GROUP_ROWS)
    return sink.getvalue()
