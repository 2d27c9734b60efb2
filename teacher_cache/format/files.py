"""Local files and folders that are complete or absent: written aside, verified, renamed."""

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def publish(path: Path, data: bytes | memoryview) -> None:
    """Give a file its final name only once all of it is on disk and reads back unchanged.

    Raises:
        OSError: If it cannot be written, or reads back different; `path` is then left
            as it was.
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
                    f"{path}: the file does not read back as it was written; check the disk"
                )
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync(path.parent)


@contextmanager
def publish_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, then rename the file: complete or absent.

    Raises:
        OSError: If it cannot be renamed; an existing file is kept.
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
    """Remove half-written files of dead processes whose names begin with this prefix."""
    for path in folder.glob(f".tmp-{prefix}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, with their names durable."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync(folder.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make system errors that name no file (a full disk) name this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


@contextmanager
def publish_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to fill, then rename it: complete or absent."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with naming(folder):
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            fsync(path)
        temporary.rename(folder)
        fsync(folder.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder: it is renamed first, so that its name holds all of it or nothing."""
    hidden = folder.with_name(f".tmp-removed-{folder.name}")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def is_utf8(path: Path) -> bool:
    """Whether a path's bytes are UTF-8; libraries that take text cannot open others."""
    try:
        str(path).encode()
        return True
    except UnicodeEncodeError:  # Python decodes other bytes as surrogates
        return False


def file_sizes(folder: Path) -> dict[str, int]:
    """Name -> size in bytes of every file in a folder; a missing folder is empty."""
    sizes: dict[str, int] = {}
    try:
        entries = os.scandir(folder)
    except FileNotFoundError:
        return sizes
    with entries:
        for entry in entries:
            try:
                if entry.is_file():
                    sizes[entry.name] = entry.stat().st_size
            except OSError as error:
                # A writer has renamed it since, or it is a link to itself: no file either way.
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    raise
    return sizes


def require_file(path: Path) -> None:
    """Refuse a pipe or device in the place of a file: reading it could wait forever.

    Raises:
        FileNotFoundError: If there is nothing.
        OSError: If it is not a file.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise OSError(f"{path}: expected a file, found {found}")


def fsync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
