"""Writing `catalog.parquet`, a table that DuckDB, polars and pandas read as it is."""

import io

import pyarrow.parquet as pq

from teacher_cache.format.catalog import Catalog
from teacher_cache.format.catalog_fields import with_typed_fields

_ROW_GROUP_ROWS = 1 << 17  # few enough to skip groups in, enough to compress well


def encode_catalog(catalog: Catalog) -> bytes:
    """The file's content, the user's fields in columns where their values have one type."""
    sink = io.BytesIO()
    table = with_typed_fields(catalog.table())
    pq.write_table(table, sink, compression="zstd", row_group_size=_ROW_GROUP_ROWS)
    return sink.getvalue()
