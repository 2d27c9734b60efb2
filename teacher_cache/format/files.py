"""Local files and folders that are either whole or absent: written beside, verified, renamed."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def publish(path: Path, data: bytes | memoryview) -> None:
    """Put a file under its final name only when all of it is on the disk and reads back equal.

    Raises:
        OSError: If it cannot be written, or reads back different; nothing stands at `path` then
            that did not stand there before.
    """
    temporary = path.parent / f".tmp-{path.name}-{uuid.uuid4().hex[:8]}"
    with naming(path):
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if temporary.read_bytes() != data:
                raise OSError(
                    f"{path}: what was written does not read back the same; check the disk"
                )
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync(path.parent)


@contextmanager
def publish_file(path: Path) -> Iterator[Path]:
    """Give a temporary name to write a file under, then put it under its own; whole or absent.

    Raises:
        OSError: If it cannot be put there; a file that stood there before stays.
    """
    temporary = path.parent / f".tmp-{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}"
    with naming(path):
        try:
            yield temporary
            fsync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync(path.parent)


def remove_unpublished(folder: Path, prefix: str = "") -> None:
    """Remove what dead processes left half written under names that begin so."""
    for path in folder.glob(f".tmp-{prefix}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, and their names durable."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync(folder.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system that name no file (a full disk) name this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


@contextmanager
def publish_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to fill, then put it under its name; whole, or not there at all."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    for path in [*temporary.rglob("*"), temporary]:
        fsync(path)
    temporary.rename(folder)
    fsync(folder.parent)


def remove_folder(folder: Path) -> None:
    """Take a folder away: its name goes first, so that under it there is all of it or nothing."""
    hidden = folder.with_name(f".tmp-removed-{folder.name}")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def fsync(path: Path) -> None:
    """Force a file, or the names in a folder, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
