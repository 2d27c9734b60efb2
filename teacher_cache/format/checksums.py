"""Checksums of files that are read again: one inside each record, one per file of a folder."""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from teacher_cache.format.files import publish
from teacher_cache.format.header import UNUSABLE_JSON, content_hash

CHECKSUMS_NAME = "checksums.json"
_CHECKSUM = "checksum"


class DamagedFileError(ValueError):
    """A file differs from what was written; the message names it and says what to do."""


def publish_record(file: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object with its own checksum; the file is complete or left as it was.

    Raises:
        OSError: If it cannot be written.
    """
    publish(file, record_bytes(values))


def record_bytes(values: Mapping[str, Any]) -> bytes:
    """A JSON object with its own checksum, as the content of a file."""
    record = {**values, _CHECKSUM: content_hash(dict(values))}
    return (json.dumps(record, indent=1) + "\n").encode()


def read_record(file: Path, remedy: str) -> dict[str, Any]:
    """Read what `publish_record` wrote, without the checksum.

    Args:
        file: File to read.
        remedy: Sentence that says what to do if it is damaged.

    Raises:
        DamagedFileError: If it differs from what was written.
        OSError: If it cannot be read.
    """
    return parse_record(file.read_bytes(), str(file), remedy)


def parse_record(data: bytes, where: str, remedy: str) -> dict[str, Any]:
    """Parse what `record_bytes` made, without the checksum; see `read_record`."""
    try:
        record: dict[str, Any] = json.loads(data.decode())
        expected, found = record.pop(_CHECKSUM), content_hash(record)
    except UNUSABLE_JSON as error:
        raise DamagedFileError(f"{where}: damaged, not readable ({error!r}). {remedy}") from error
    if found != expected:
        raise DamagedFileError(
            f"{where}: damaged (checksum {found}, expected {expected}). {remedy}"
        )
    return record


def write_checksums(folder: Path, *, leave_out: Collection[str] = ()) -> None:
    """Store the sha256 of every file in a folder; do not write there afterwards."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder).as_posix() for path in files}
    hashes = {name: sha256_of(path) for path, name in names.items() if name not in leave_out}
    publish_record(folder / CHECKSUMS_NAME, {"sha256": hashes})


def check_folder(folder: Path, remedy: str) -> None:
    """Read and compare every file that has a checksum; later files are ignored.

    Args:
        folder: Folder with checksums from `write_checksums`.
        remedy: Sentence that says what to do if a file is damaged or missing.

    Raises:
        DamagedFileError: Naming the first such file.
        OSError: If one cannot be read.
    """
    file = folder / CHECKSUMS_NAME
    if not file.exists():
        raise DamagedFileError(f"{file}: missing. {remedy}")
    for name, expected in read_record(file, remedy)["sha256"].items():
        path = folder / name
        if not path.is_file():
            raise DamagedFileError(f"{path}: missing. {remedy}")
        found = sha256_of(path)
        if found != expected:
            raise DamagedFileError(
                f"{path}: damaged (sha256 {found[:16]}, expected {expected[:16]}). {remedy}"
            )


def sha256_of(file: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
