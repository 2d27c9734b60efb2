"""Tables as rows: Parquet, Arrow files and streams, folders of `datasets`' `save_to_disk`."""

import json
import math
from collections.abc import Iterable, Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from teacher_cache.sources.rejects import SourceError
from teacher_cache.sources.row import Row

_ROWS_PER_BATCH = 64  # a trace may take megabytes
ARROW_STREAM_MAGIC = b"\xff\xff\xff\xff"
ARROW_FILE_MAGIC = b"ARROW1"
PARQUET_MAGIC = b"PAR1"


def table_rows(path: Path, head: bytes) -> Iterator[Row]:
    """Rows of a Parquet or Arrow file, read batch by batch.

    Raises:
        SourceError: If the file is damaged or cut short.
    """
    number = 0
    try:
        for batch in _batches(path, head):
            simple = all(_is_json(column.type) for column in batch.schema)
            for values in batch.to_pylist():
                number += 1
                yield Row(str(path), number, values if simple else plain(values))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{path}: the table is damaged or cut short after row {number}: {error}"
        ) from error


def _batches(path: Path, head: bytes) -> Iterator[pa.RecordBatch]:
    if head.startswith(PARQUET_MAGIC):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):  # all at once would read far ahead
                yield from file.iter_batches(_ROWS_PER_BATCH, row_groups=[group])
        return
    with pa.OSFile(str(path)) as source:
        if head.startswith(ARROW_FILE_MAGIC):
            reader = pa.ipc.open_file(source)
            batches: Iterable[pa.RecordBatch] = map(
                reader.get_batch, range(reader.num_record_batches)
            )
        else:
            batches = pa.ipc.open_stream(source)
        for batch in batches:
            for start in range(0, batch.num_rows, _ROWS_PER_BATCH):
                yield batch.slice(start, _ROWS_PER_BATCH)


def _is_json(kind: pa.DataType) -> bool:
    """Whether a column's values are already JSON values."""
    if pa.types.is_nested(kind):
        return not pa.types.is_map(kind) and all(
            _is_json(kind.field(i).type) for i in range(kind.num_fields)
        )
    simple = ("is_string", "is_large_string", "is_integer", "is_boolean", "is_null")
    return any(getattr(pa.types, check)(kind) for check in simple)


def plain(value: Any) -> Any:  # noqa: ANN401 (what a column may hold)
    """A value as JSON represents it: times as ISO 8601 text, decimals as text, NaN as null.

    Values without such a form (bytes, images) are unchanged, and refused where needed.
    """
    match value:
        case dict():
            return {str(name): plain(item) for name, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case float():
            return value if math.isfinite(value) else None
        case datetime() | date() | time():
            return value.isoformat()
        case Decimal() | timedelta():
            return str(value)
        case _:
            return value


def saved_dataset_files(folder: Path, split: str) -> list[Path] | None:
    """The Arrow files of a folder saved by `datasets`; None for any other folder.

    Raises:
        SourceError: If it has several splits but not this one, or its own files are damaged.
    """
    splits_file = folder / "dataset_dict.json"
    if splits_file.exists():
        splits = _json(splits_file).get("splits", [])
        if split not in splits:
            raise SourceError(
                f"{folder}: no split {split!r}, found {', '.join(splits)}; name one with --split"
            )
        folder = folder / split
    state_file = folder / "state.json"
    if not state_file.exists():
        return None
    try:
        return [folder / item["filename"] for item in _json(state_file)["_data_files"]]
    except (KeyError, TypeError) as error:
        raise SourceError(f"{state_file}: not written by `datasets`: {error!r}") from error


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except ValueError as error:
        raise SourceError(f"{file}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise SourceError(f"{file}: expected a JSON object")
    return values
