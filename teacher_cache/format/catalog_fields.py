"""The user's fields of traces in the catalogue: typed columns where their values allow it.

A field whose values all have one scalar type is a child of the struct `fields`; everything else,
explicit nulls included, is in the text of a JSON object, `fields_json`, which is null where empty.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

MAX_TYPED_FIELDS = 200
_ROWS_AT_A_TIME = 1 << 16
_INT64 = range(-(1 << 63), 1 << 63)
_KINDS = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}


def json_of_fields(fields: Sequence[Mapping[str, Any]]) -> pa.Array:
    """The fields of each trace as the text of a JSON object; null where there are none."""
    return pa.array([json.dumps(dict(own)) if own else None for own in fields], pa.string())


def parsed_fields(typed: pa.ChunkedArray | None, texts: pa.ChunkedArray) -> list[dict[str, Any]]:
    """Put the fields of traces together again.

    Raises:
        ValueError: If a text is not a JSON object.
    """
    found: list[dict[str, Any]] = []
    structs = [None] * len(texts) if typed is None else typed.to_pylist()
    for struct, text in zip(structs, texts.to_pylist(), strict=True):
        own = {name: value for name, value in (struct or {}).items() if value is not None}
        if text is not None:
            further = json.loads(text)
            if not isinstance(further, dict):
                raise ValueError(f"expected a JSON object, got {text[:80]!r}")
            own |= further
        found.append(own)
    return found


def with_typed_fields(table: pa.Table) -> pa.Table:
    """Move what can be typed out of `fields_json` into a column `fields`, if there is any."""
    kinds = _column_kinds(table["fields_json"])
    if not kinds:
        return table
    structs, texts = [], []
    for rows in _parsed(table["fields_json"]):
        columns = [pa.array([row.get(name) for row in rows], kinds[name]) for name in kinds]
        structs.append(pa.StructArray.from_arrays(columns, list(kinds)))
        texts.append(json_of_fields([_untyped(row, kinds) for row in rows]))
    position = table.schema.get_field_index("fields_json")
    table = table.set_column(position, "fields_json", pa.chunked_array(texts))
    return table.add_column(position, "fields", pa.chunked_array(structs))


def _untyped(row: Mapping[str, Any], kinds: Mapping[str, pa.DataType]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in kinds or value is None}


def _column_kinds(texts: pa.ChunkedArray) -> dict[str, pa.DataType]:
    """Type of every field that gets a column, in order of appearance."""
    found: dict[str, set[type | None]] = {}
    for rows in _parsed(texts):
        for row in rows:
            for name, value in row.items():
                if value is not None:
                    found.setdefault(name, set()).add(_kind(value))
    kinds = {
        name: _KINDS[kind]
        for name, (kind, *others) in ((name, tuple(kinds)) for name, kinds in found.items())
        if not others and kind is not None and name and _is_unicode(name)
    }
    folded = Counter(name.casefold() for name in kinds)  # SQL knows no case in names
    names = [name for name in kinds if folded[name.casefold()] == 1]
    return {name: kinds[name] for name in names[:MAX_TYPED_FIELDS]}


def _kind(value: object) -> type | None:
    """The type of a value that a column can hold; None for any other."""
    kind = type(value)
    if kind is int:
        return int if value in _INT64 else None
    if kind is str:
        return str if _is_unicode(str(value)) else None
    return kind if kind in _KINDS else None


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded: JSON's escapes may hold half of a pair."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _parsed(texts: pa.ChunkedArray) -> Iterator[list[dict[str, Any]]]:
    for first in range(0, len(texts), _ROWS_AT_A_TIME):
        yield parsed_fields(None, texts.slice(first, _ROWS_AT_A_TIME))
