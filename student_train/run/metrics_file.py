"""`metrics.jsonl` of a run: one JSON object per logged step, cut back where a run is resumed."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from teacher_cache.format.checksums import DamagedFileError


@dataclass(frozen=True)
class MetricsMark:
    """State of `metrics.jsonl` at some moment: its first bytes, by number and hash."""

    num_bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """The mark as a JSON object of the constructor's arguments."""
        return asdict(self)


class MetricsFile:
    """The file, which the main process writes; all but `check` belongs after `begin`."""

    def __init__(self, path: Path) -> None:
        """Name the file; nothing is created."""
        self.path = path
        self._num_bytes, self._hash = 0, hashlib.sha256()

    def begin(self, mark: MetricsMark | None) -> None:
        """Cut the file back to a mark; None empties it."""
        with self.path.open("ab") as file:
            file.truncate(0 if mark is None else mark.num_bytes)
        text = self.path.read_bytes()
        self._num_bytes, self._hash = len(text), hashlib.sha256(text)

    @property
    def mark(self) -> MetricsMark:
        """Mark of the file as this process left it."""
        return MetricsMark(self._num_bytes, self._hash.hexdigest())

    def check(self, mark: MetricsMark) -> None:
        """Compare the first bytes with a mark.

        Raises:
            DamagedFileError: If they differ, or there are fewer.
        """
        text = b""
        if self.path.exists():
            with self.path.open("rb") as file:
                text = file.read(mark.num_bytes)
        found = MetricsMark(len(text), hashlib.sha256(text).hexdigest())
        if found != mark:
            raise DamagedFileError(
                f"{self.path}: damaged in its first {mark.num_bytes:,} bytes (sha256 "
                f"{found.sha256[:16]}, expected {mark.sha256[:16]})."
            )

    def append(self, values: Mapping[str, Any]) -> None:
        """Add one line."""
        line = (json.dumps(values) + "\n").encode()
        with self.path.open("ab") as file:
            file.write(line)
        self._num_bytes += len(line)
        self._hash.update(line)

    def last(self) -> dict[str, Any]:
        """The last line."""
        return self._lines()[-1]

    def of_step(self, step: int) -> dict[str, Any]:
        """The line of a logged step."""
        return next(values for values in self._lines() if values["step"] == step)

    def _lines(self) -> list[dict[str, Any]]:
        self.check(self.mark)
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
