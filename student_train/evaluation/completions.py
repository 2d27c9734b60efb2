"""Completions and their verdicts in a file: appended as they come, and resumed after a stop.

FILE                    one JSON object per line, in the order in which they finished
FILE.settings.json      the settings behind them; written before the first line
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from teacher_cache.format.checksums import DamagedFileError, publish_record, read_record
from teacher_cache.format.folder_lock import FolderLock
from teacher_cache.format.header import UNUSABLE_JSON, content_hash

_CHECKSUM = "checksum"
_REMEDY = "Restore it from a copy, or start it anew with --force."
_SYNC_INTERVAL_S = 5.0  # what a power failure can take; a crash of this process takes nothing


@dataclass(frozen=True)
class Completion:
    """Output of a model for one prompt."""

    text: str  # special tokens included
    num_tokens: int  # the end token included
    finished: bool  # whether it ended by itself


@dataclass(frozen=True)
class Sample:
    """One completion of one prompt, checked: a line of the file."""

    prompt: int  # number of the prompt, from 0
    sample: int  # number among the samples of that prompt, from 0
    group: str | None
    found: str | None  # the answer; None where the chain of thought was never closed
    right: bool
    compared_as: str  # see verdicts.Verdict
    closed: bool  # whether the chain of thought, if one was opened, was closed
    completion: Completion

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Sample":
        """Read a line."""
        return cls(**{**record, "completion": Completion(**record["completion"])})


class CompletionLog:
    """The samples of an evaluation so far; with a file, those in it."""

    def __init__(self, file: Any = None) -> None:  # noqa: ANN401  # a binary file
        self.samples: dict[tuple[int, int], Sample] = {}
        self._file = file
        self._synced_s = time.monotonic()

    def add(self, sample: Sample) -> None:
        """Keep a sample; when this returns, it outlives this process."""
        self.samples[sample.prompt, sample.sample] = sample
        if self._file is None:
            return
        record = asdict(sample)
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
        for sample in _samples(whole, path):
            self.samples[sample.prompt, sample.sample] = sample
        self._file.truncate(len(whole))
        self._file.seek(0, os.SEEK_END)


def read_completions(path: Path) -> tuple[dict[str, Any], list[Sample]]:
    """Settings and samples of an evaluation's file, by prompt; an incomplete last line is left out.

    Raises:
        DamagedFileError: If a sample or the settings are damaged.
        OSError: If either file cannot be read.
    """
    content = path.read_bytes()
    found = _samples(content[: content.rfind(b"\n") + 1], path)
    samples = {(sample.prompt, sample.sample): sample for sample in found}
    return read_record(_settings_file(path), _REMEDY), [samples[key] for key in sorted(samples)]


def _samples(lines: bytes, path: Path) -> Iterator[Sample]:
    for number, line in enumerate(lines.splitlines(), start=1):
        try:
            record = json.loads(line)
            is_whole = record.pop(_CHECKSUM) == content_hash(record)
            sample = Sample.from_json(record)
        except UNUSABLE_JSON as error:
            raise DamagedFileError(f"{path}:{number}: damaged ({error!r}). {_REMEDY}") from error
        if not is_whole:
            raise DamagedFileError(f"{path}:{number}: damaged since it was written. {_REMEDY}")
        yield sample


@contextlib.contextmanager
def completion_log(
    path: Path | None, settings: Mapping[str, Any], *, force: bool
) -> Iterator[CompletionLog]:
    """Open the file of an evaluation, new or to be resumed.

    Args:
        path: Path of the file; None keeps the samples only in memory.
        settings: Everything that completions and verdicts depend on.
        force: Whether to start anew, whatever the file holds.

    Raises:
        ValueError: If it holds the completions of another evaluation.
        DamagedFileError: If one of them is damaged.
        InUseError: If another process writes there.
    """
    if path is None:
        yield CompletionLog()
        return
    with FolderLock(path.with_name(f".{path.name}.lock"), owned=path), path.open("ab+") as file:
        if force:
            file.truncate(0)
        elif file.tell():  # at its end
            _check_settings(path, settings)
        publish_record(_settings_file(path), settings)
        log = CompletionLog(file)
        log.read(path)
        try:
            yield log
        finally:
            file.flush()
            os.fsync(file.fileno())


def _settings_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.settings.json")


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    try:
        before = read_record(_settings_file(path), _REMEDY)
    except FileNotFoundError as error:
        raise ValueError(
            f"{path}: it exists, but {_settings_file(path).name}, which records its settings, is "
            "missing beside it. Name another file, or --force to overwrite it"
        ) from error
    now = json.loads(json.dumps(settings))
    for name in [*now, *before]:
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{path} holds the completions of another evaluation ({name}: "
                f"{before.get(name)!r} before, {now.get(name)!r} now). Name another file, repeat "
                "that evaluation's settings to continue it, or --force to overwrite it"
            )
