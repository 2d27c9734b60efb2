"""Store: the location of a cache, a local folder or a URI that pyarrow.fs supports.

A file is published complete or not at all. Locally and on HDFS it is written aside, verified and
renamed; an object store shows a key only once it is complete.
"""

import logging
import os
import random
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from teacher_cache.format.errors import CacheError
from teacher_cache.format.files import (
    file_sizes,
    is_utf8,
    make_folder,
    publish,
    remove_unpublished,
    require_file,
)
from teacher_cache.format.reachable import check_reachable

logger = logging.getLogger(__name__)

CachePath = str | os.PathLike[str]  # a folder, or a URI (s3://, gs://, hdfs://, file://)

# Waits between tries, in seconds: about two minutes of outage. Each S3 try includes Arrow's few
# seconds of retries, which a URI cannot set; gs:// has `?retry_limit_seconds=`.
RETRY_WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_PERMANENT = re.compile(
    "ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|EXPIRED_TOKEN|NO_SUCH_BUCKET"
    "|PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT"
)
_OBJECT_STORES = {"s3", "gcs", "abfs"}  # a PUT shows all of a key or nothing

_T = TypeVar("_T")


@dataclass(frozen=True)
class Store:
    """Access to the files of one cache; names are relative to its root, with `/`."""

    where: str  # its name in messages, without credentials
    filesystem: pafs.FileSystem
    root: str

    @property
    def folder(self) -> Path | None:
        """The folder of a local cache; None for a remote one."""
        return Path(self.root) if isinstance(self.filesystem, pafs.LocalFileSystem) else None

    def read(self, name: str) -> bytes:
        """Read all of a file.

        Raises:
            FileNotFoundError: If it is missing.
            ConnectionError: If a remote store fails every time.
            OSError: If it cannot be read.
        """
        return self._retried(name, lambda: self._read(self._path(name)))

    def read_range(self, name: str, offset: int, num_bytes: int) -> pa.Buffer:
        """Read bytes of a file from `offset`, fewer if it ends early; raises as `read`."""

        def action() -> pa.Buffer:
            handler = getattr(self.filesystem, "handler", None)
            if isinstance(handler, pafs.FSSpecHandler):  # its files read 5 MiB ahead otherwise
                with handler.fs.open(self._path(name), "rb", cache_type="none") as file:
                    file.seek(offset)
                    return pa.py_buffer(file.read(num_bytes))
            with self._opened(self._path(name)) as file:
                file.seek(offset)
                return file.read_buffer(num_bytes)

        return self._retried(name, action)

    def size(self, name: str) -> int | None:
        """Size of a file in bytes; None if it is missing."""
        info = self._retried(name, lambda: self.filesystem.get_file_info(self._path(name)))
        return int(info.size) if info.type == pafs.FileType.File else None

    def sizes(self, folder: str) -> dict[str, int]:
        """Name -> size of every file in a folder; a missing folder is empty."""
        if self.folder is not None:  # names need not be UTF-8 there, which pyarrow wants
            return file_sizes(self.folder / folder)
        selector = pafs.FileSelector(self._path(folder), allow_not_found=True)
        infos = self._retried(folder, lambda: self.filesystem.get_file_info(selector))
        return {i.base_name: int(i.size) for i in infos if i.type == pafs.FileType.File}

    def publish(self, name: str, data: bytes | memoryview) -> None:
        """Give a file its final name once it is complete and reads back unchanged.

        Raises:
            OSError: If that fails, on a remote store after several tries; a file already
                there may then be the old or the new one, never a part.
        """
        if self.folder is not None:
            publish(self.folder / name, data)
        elif self.filesystem.type_name in _OBJECT_STORES:
            self._retried(name, lambda: self._write(self._path(name), data))
        else:
            self._retried(name, lambda: self._write_and_rename(self._path(name), data))

    def make_folder(self, name: str) -> None:
        """Make a folder if files need one; object stores have none."""
        if self.folder is not None:
            make_folder(self.folder / name)
        elif self.filesystem.type_name not in _OBJECT_STORES:
            self._retried(name, lambda: self.filesystem.create_dir(self._path(name)))

    def remove_unpublished(self, folder: str, prefix: str = "") -> None:
        """Remove half-written files left by dead writers; object stores show none."""
        if self.folder is not None:
            remove_unpublished(self.folder / folder, prefix)

    def remove(self, name: str) -> None:
        """Remove a file; a missing one is no error."""
        if self.size(name) is not None:
            self._retried(name, lambda: self.filesystem.delete_file(self._path(name)))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}".rstrip("/")

    def _read(self, path: str) -> bytes:
        with self._opened(path) as file:
            return bytes(file.read())

    def _opened(self, path: str) -> pa.NativeFile:
        if self.folder is not None:
            require_file(Path(path))
        return self.filesystem.open_input_file(path)

    def _write(self, path: str, data: bytes | memoryview) -> None:
        with self.filesystem.open_output_stream(path) as file:
            file.write(data)
        if self._read(path) != data:
            raise OSError("the file does not read back as it was written")

    def _write_and_rename(self, path: str, data: bytes | memoryview) -> None:
        temporary = f"{path.rpartition('/')[0]}/.tmp-{uuid.uuid4().hex}"
        self._write(temporary, data)
        # HDFS does not rename over a file. A crash in between costs only cache.json, which the
        # next writer recreates: shards have unique names.
        if self.filesystem.get_file_info(path).type == pafs.FileType.File:
            self.filesystem.delete_file(path)
        self.filesystem.move(temporary, path)

    def _retried(self, name: str, action: Callable[[], _T]) -> _T:
        if self.folder is not None:
            return action()
        return _retried(f"{self.where}/{name}", action)


def _retried(where: str, action: Callable[[], _T]) -> _T:
    for number, wait_s in enumerate((*RETRY_WAITS_S, None), start=1):
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError as error:
            if _PERMANENT.search(str(error)):
                raise OSError(f"{where}: {error}") from error
            if wait_s is None:
                raise ConnectionError(f"{where}: gave up after {number} tries: {error}") from error
            logger.warning("%s: %s; trying again in %g s", where, error, wait_s)
            time.sleep(wait_s * random.uniform(0.5, 1.0))  # spreads out the workers
    raise AssertionError("unreachable")


def open_store(path: CachePath) -> Store:
    """Open the store that a path or URI names; nothing is read and nothing need exist.

    Endpoint and credentials come from the URI or the environment, as pyarrow reads them.

    Raises:
        CacheError: If pyarrow cannot open it.
    """
    text = os.fspath(path)
    if "://" not in text:
        if not is_utf8(Path(text)):
            raise CacheError(f"{text}: the folder's name is not UTF-8; rename it")
        return Store(text, pafs.LocalFileSystem(), text.rstrip("/") or "/")
    where = shown(text)
    check_reachable(text, where)
    try:
        filesystem, root = _retried(where, lambda: _filesystem(text))
    except (pa.ArrowInvalid, OSError, ValueError, ImportError) as error:
        reason = str(error).replace(text, where)
        raise CacheError(f"{where}: cannot be opened: {reason}") from error
    if not root.strip("/"):
        raise CacheError(f"{where}: expected a bucket and a folder")
    return Store(where, filesystem, root.rstrip("/"))


def _filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a URI and the path in it: pyarrow's own, or else fsspec's.

    Raises:
        ValueError: If neither knows the scheme (pyarrow's ArrowInvalid is one).
        ImportError: If fsspec, or what it needs for the scheme, is not installed.
    """
    try:
        found: tuple[pafs.FileSystem, str] = pafs.FileSystem.from_uri(uri)
    except pa.ArrowInvalid as error:
        if "Unrecognized filesystem type" not in str(error):
            raise
    else:
        return found
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(uri)
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), root


def shown(path: CachePath) -> str:
    """A path or URI for messages and records, without credentials and query."""
    text = os.fspath(path)
    if "://" not in text:
        return text
    parts = urlsplit(text)
    netloc = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=netloc, query="", fragment="").geturl()


def identity(path: CachePath) -> str:
    """Identity of a cache's location, whatever its credentials."""
    text = os.fspath(path)
    if "://" not in text:
        return str(Path(text).resolve())
    endpoint = parse_qs(urlsplit(text).query).get("endpoint_override", [""])[0]
    return f"{endpoint} {shown(text).rstrip('/')}".strip()
