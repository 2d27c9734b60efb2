"""Further fields of traces, from a file beside the caches, that `--where` can ask for."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from teacher_cache.format import Cache, TraceInfo

_KEYS = ("trace_id", "cache_fingerprint")


@dataclass(frozen=True)
class TraceFields:
    """One object per trace: `trace_id`, its fields, and `cache_fingerprint` where ids recur.

    `train-student profile` writes such a file.
    """

    path: Path
    sha256: str  # hash of the file
    # Keyed by cache fingerprint (None where a line names no cache) and trace id.
    fields: Mapping[tuple[str | None, str], Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path) -> "TraceFields":
        """Read a JSONL file.

        Raises:
            OSError: If it cannot be read.
            ValueError: If a line is not an object with a `trace_id`, or a trace has two lines.
        """
        content = path.read_bytes()
        fields: dict[tuple[str | None, str], Mapping[str, Any]] = {}
        for number, line in enumerate(content.splitlines(), start=1):
            where = f"{path}: line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: expected a JSON object: {error}") from error
            if not isinstance(row, dict) or not isinstance(row.get("trace_id"), str):
                raise ValueError(f"{where}: expected an object with a trace_id of text")
            key = row.get("cache_fingerprint"), row["trace_id"]
            if key in fields:
                raise ValueError(f"{where}: trace {key[1]!r} is already on an earlier line")
            fields[key] = {name: value for name, value in row.items() if name not in _KEYS}
        return cls(path, hashlib.sha256(content).hexdigest()[:32], fields)

    @property
    def names(self) -> set[str]:
        """Names of the fields of all traces."""
        return {name for row in self.fields.values() for name in row}

    def added_to(self, info: TraceInfo, cache: Cache) -> TraceInfo:
        """The trace with its further fields; unchanged where the file has none for it.

        Raises:
            ValueError: If the trace has a field of the same name.
        """
        own = self.fields.get((cache.fingerprint, info.trace_id))
        further = self.fields.get((None, info.trace_id), {}) if own is None else own
        for name in further:
            if name in info.fields:
                raise ValueError(
                    f"{self.path}: trace {info.trace_id!r} of {cache.path} has a field {name!r} of "
                    "its own; rename it in the file"
                )
        return replace(info, fields={**info.fields, **further}) if further else info
