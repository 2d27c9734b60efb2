"""InputTraces: the user's input as traces, each id once; every row left out is recorded."""

import logging
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.sources.columns import RowColumns, responses_of
from teacher_cache.sources.files import Input
from teacher_cache.sources.json_files import parse_line
from teacher_cache.sources.rejects import BadRow, Reason, Rejects, SourceError
from teacher_cache.sources.render import given_id
from teacher_cache.sources.row import Row
from teacher_cache.sources.trace import Render, SourceTrace

logger = logging.getLogger(__name__)

_NUM_SHOWN = 5  # missing ids named in a message


@dataclass(frozen=True)
class InputTraces:
    """Prompts or traces as the teacher will see them.

    `read` goes over the input from the start, as often as it is called. With `strict` the first
    unusable row raises SourceError; otherwise it goes into the list of rejects.
    """

    input: Input
    render: Render
    id_field: str = "id"
    strict: bool = False
    only_ids: frozenset[str] | None = None  # leave out every other row
    columns: RowColumns | None = None  # layout of traces, of which a row may hold several
    passed_over: NDArray[np.bool_] | None = None  # [rows] those that nothing is left to do for

    @property
    def path(self) -> Path:
        """Path of the input, as the user named it."""
        return self.input.path

    def read(self, rejects: Rejects) -> Iterator[SourceTrace]:
        """Yield the rendered rows, each id once; memory holds the ids and `rejects`.

        Raises:
            SourceError: If the input cannot be read to its end, or a row is bad under `strict`.
        """
        return (trace for _, trace in self.read_numbered(rejects))

    def read_numbered(
        self, rejects: Rejects, on_row: Callable[[Row], None] = lambda row: None
    ) -> Iterator[tuple[int, SourceTrace]]:
        """Yield traces as `read`, each with the number of its row in the input, from 0.

        Args:
            rejects: Gets the rows that cannot be used.
            on_row: Called with every row of the input, before anything is done with it.
        """
        seen: dict[str, tuple[str, int]] = {}
        done = np.zeros(0, np.bool_) if self.passed_over is None else self.passed_over
        for number, row in enumerate(self.input):
            on_row(row)
            if number < len(done) and done[number]:
                continue
            try:
                parts = self._parts(row)
            except BadRow as error:
                self._reject(row, None, error, rejects)
                continue
            for values in parts:
                trace = self._rendered(row, values, seen, rejects)
                if trace is not None:
                    seen[trace.trace_id] = (row.file, row.number)
                    yield number, trace

    def _parts(self, row: Row) -> list[dict[str, Any]]:
        values = row_values(row)
        return [values] if self.columns is None else responses_of(values, self.columns)

    def _rendered(
        self,
        row: Row,
        values: dict[str, Any],
        seen: Mapping[str, tuple[str, int]],
        rejects: Rejects,
    ) -> SourceTrace | None:
        """A row's trace; None if it is not wanted, or rejected."""
        name = None
        try:
            name = given_id(values, self.id_field)
            if self.only_ids is not None and name is not None and name not in self.only_ids:
                return None
            trace = self.render(values)
            if trace.trace_id in seen:
                file, number = seen[trace.trace_id]
                raise BadRow(
                    Reason.DUPLICATE_ID,
                    f"id {trace.trace_id!r} already occurs in {file}:{number}",
                )
        except BadRow as error:
            self._reject(row, name, error, rejects)
            return None
        return trace if self.only_ids is None or trace.trace_id in self.only_ids else None

    def _reject(self, row: Row, name: str | None, error: BadRow, rejects: Rejects) -> None:
        if self.strict:
            raise SourceError(
                f"{row.file}:{row.number}: {error} [{error.reason}]. Fix the row, or "
                "leave out --strict to skip such rows."
            ) from error
        rejects.add(row.file, row.number, name, error)

    def say_missing_ids(self, found: AbstractSet[str]) -> None:
        """Report which of the requested ids are missing from the input."""
        missing = sorted((self.only_ids or frozenset()) - found)
        if missing:
            shown = ", ".join(missing[:_NUM_SHOWN]) + (", ..." if len(missing) > _NUM_SHOWN else "")
            logger.warning("%s: ids asked for but missing: %d, %s", self.path, len(missing), shown)


def row_values(row: Row) -> dict[str, Any]:
    """A row's values by column; raises BadRow if it is not an object."""
    content = parse_line(row.content) if isinstance(row.content, bytes) else row.content
    if not isinstance(content, dict):
        raise BadRow(Reason.NOT_AN_OBJECT, f"expected a JSON object, got {type(content).__name__}")
    return content


def read_ids(path: Path) -> frozenset[str]:
    """Read the ids of a file, one per line.

    Raises:
        SourceError: If it cannot be read, or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8: {error.reason}") from error
    ids = frozenset(line.strip() for line in lines if line.strip())
    if not ids:
        raise SourceError(f"{path}: expected one id per line, found none")
    return ids
