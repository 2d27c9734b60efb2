"""What a model wrote, in a file: appended as it comes, and resumed after a stop.

FILE                    one JSON object per line, in the order in which they finished
FILE.settings.json      the settings behind them; written before the first line
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from teacher_cache.format.checksums import DamagedFileError, publish_record, read_record
from teacher_cache.format.folder_lock import FolderLock
from teacher_cache.format.header import UNUSABLE_JSON, content_hash

_CHECKSUM = "checksum"
_REMEDY = "Restore it from a copy, or start it anew with --force."
_SYNC_INTERVAL_S = 5.0  # what a power failure can take; a crash of this process takes nothing

_Line = TypeVar("_Line")


@dataclass(frozen=True)
class Lines(Generic[_Line]):
    """The lines of a file: how they are written, and what tells them apart."""

    of_others: str  # what a file with other settings holds, for the message
    place: Callable[[_Line], tuple[int, int]]  # number of the prompt, and of its sample
    to_json: Callable[[_Line], dict[str, Any]]
    from_json: Callable[[Mapping[str, Any]], _Line]  # raises one of UNUSABLE_JSON


class SampleLog(Generic[_Line]):
    """The samples of a command so far; with a file, those in it."""

    def __init__(self, lines: Lines[_Line], file: Any = None) -> None:  # noqa: ANN401  # a binary file
        self.samples: dict[tuple[int, int], _Line] = {}
        self._lines = lines
        self._file = file
        self._synced_s = time.monotonic()

    def add(self, sample: _Line) -> None:
        """Keep a sample; when this returns, it outlives this process."""
        self.samples[self._lines.place(sample)] = sample
        if self._file is None:
            return
        record = self._lines.to_json(sample)
        line = json.dumps({**record, _CHECKSUM: content_hash(record)})
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        if time.monotonic() - self._synced_s > _SYNC_INTERVAL_S:
            os.fsync(self._file.fileno())
            self._synced_s = time.monotonic()

    def read(self, path: Path) -> None:
        """Read the samples of the file, and cut off an incomplete last line."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        for sample in _samples(whole, path, self._lines):
            self.samples[self._lines.place(sample)] = sample
        self._file.truncate(len(whole))
        self._file.seek(0, os.SEEK_END)


def read_samples(path: Path, lines: Lines[_Line]) -> tuple[dict[str, Any], list[_Line]]:
    """Settings and samples of a file, by prompt; an incomplete last line is left out.

    Raises:
        DamagedFileError: If a sample or the settings are damaged.
        OSError: If either file cannot be read.
    """
    content = path.read_bytes()
    found = _samples(content[: content.rfind(b"\n") + 1], path, lines)
    samples = {lines.place(sample): sample for sample in found}
    return read_record(settings_file(path), _REMEDY), [samples[key] for key in sorted(samples)]


def _samples(content: bytes, path: Path, lines: Lines[_Line]) -> Iterator[_Line]:
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            record = json.loads(line)
            is_whole = record.pop(_CHECKSUM) == content_hash(record)
            sample = lines.from_json(record)
        except UNUSABLE_JSON as error:
            raise DamagedFileError(f"{path}:{number}: damaged ({error!r}). {_REMEDY}") from error
        if not is_whole:
            raise DamagedFileError(f"{path}:{number}: damaged since it was written. {_REMEDY}")
        yield sample


@contextlib.contextmanager
def sample_log(
    path: Path | None, settings: Mapping[str, Any], lines: Lines[_Line], *, force: bool
) -> Iterator[SampleLog[_Line]]:
    """Open a file of samples, new or to be resumed.

    Args:
        path: Path of the file; None keeps the samples only in memory.
        settings: Everything that the samples depend on.
        lines: What the file's lines are.
        force: Whether to start anew, whatever the file holds.

    Raises:
        ValueError: If it holds samples of other settings.
        DamagedFileError: If one of them is damaged.
        InUseError: If another process writes there.
    """
    if path is None:
        yield SampleLog(lines)
        return
    with FolderLock(path.with_name(f".{path.name}.lock"), owned=path), path.open("ab+") as file:
        if force:
            file.truncate(0)
        elif file.tell():  # at its end
            _check_settings(path, settings, lines.of_others)
        publish_record(settings_file(path), settings)
        log = SampleLog(lines, file)
        log.read(path)
        try:
            yield log
        finally:
            file.flush()
            os.fsync(file.fileno())


def settings_file(path: Path) -> Path:
    """The file beside a file of samples that holds its settings."""
    return path.with_name(f"{path.name}.settings.json")


def _check_settings(path: Path, settings: Mapping[str, Any], of_others: str) -> None:
    try:
        before = read_record(settings_file(path), _REMEDY)
    except FileNotFoundError as error:
        raise ValueError(
            f"{path}: it exists, but {settings_file(path).name}, which records its settings, is "
            "missing beside it. Name another file, or --force to overwrite it"
        ) from error
    now = json.loads(json.dumps(settings))
    for name in [*now, *before]:
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{path} holds {of_others} ({name}: {before.get(name)!r} before, "
                f"{now.get(name)!r} now). Name another file, repeat those settings to continue it, "
                "or --force to overwrite it"
            )
