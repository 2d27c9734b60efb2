"""Sources of the prompts of a cache's traces: the cache itself, or the user's rows by id."""

import json
import re
import sqlite3
from collections.abc import Set as AbstractSet
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol, Self

from teacher_cache.format import Cache
from teacher_cache.sources.files import Input
from teacher_cache.sources.input_traces import row_values
from teacher_cache.sources.rejects import BadRow, Reason, Rejects
from teacher_cache.sources.render import given_id

_SAMPLE = re.compile(r"#\d+\Z")  # suffix of one of several answers to a prompt


class Prompts(Protocol):
    """Looks up rows by trace id."""

    def row_of(self, trace_id: str) -> dict[str, Any] | None:
        """The row that a trace was made from; None if it is unknown."""
        ...


@dataclass(frozen=True)
class CachedPrompts:
    """The messages that a capture keeps beside its traces."""

    cache: Cache

    def row_of(self, trace_id: str) -> dict[str, Any] | None:
        """The messages of a trace's prompt; None for older caches and for text prompts."""
        asked = self.cache.messages(trace_id)
        return None if asked is None else dict(asked)


class PromptRows:
    """Rows of a file, kept in a database that moves to disk when it grows large."""

    def __init__(
        self, source: Input, id_field: str, wanted: AbstractSet[str], rejects: Rejects
    ) -> None:
        """Read all rows once.

        Args:
            source: File, folder or hub id of the rows.
            id_field: Column with the id.
            wanted: Ids of the traces; other rows are skipped.
            rejects: Collects rows that cannot be read.
        """
        self._database = sqlite3.connect("")  # without a name: private and temporary
        self._database.execute("CREATE TABLE rows (id TEXT PRIMARY KEY, content TEXT)")
        known = {*wanted, *(_SAMPLE.sub("", name) for name in wanted)}
        for row in source:
            try:
                values = row_values(row)
                name = given_id(values, id_field)
                if name is not None and name in known:
                    self._keep(name, json.dumps(values))
            except BadRow as error:
                rejects.add(row.file, row.number, None, error)

    def _keep(self, name: str, content: str) -> None:
        try:
            self._database.execute("INSERT INTO rows VALUES (?, ?)", (name, content))
        except sqlite3.IntegrityError as error:
            raise BadRow(
                Reason.DUPLICATE_ID, f"id {name!r} already occurs in an earlier row"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._database.close()

    def row_of(self, trace_id: str) -> dict[str, Any] | None:
        """The row of a trace, or of the prompt if the trace is one of several answers to it."""
        for name in (trace_id, _SAMPLE.sub("", trace_id)):
            with closing(
                self._database.execute("SELECT content FROM rows WHERE id = ?", (name,))
            ) as found:
                row = found.fetchone()
            if row is not None:
                values: dict[str, Any] = json.loads(row[0])
                return values
        return None
