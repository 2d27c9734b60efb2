"""A local folder with the leading bytes of remote shards, shared by all their readers.

A file `<sha256 of the shard>.prefix` holds as many leading bytes of that shard as some reader has
needed so far: a larger lead span fetches only what is missing. It is replaced by renaming, so that
readers see the old or the new one. All writing happens under one lock of the folder, to keep
its size bound; fetching under one lock per shard, so that no bytes are fetched twice.
"""

import fcntl
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

logger = logging.getLogger(__name__)

_SUFFIX = ".prefix"

Fetch = Callable[[int, int], pa.Buffer]  # (offset, number of bytes) -> bytes, fewer at the end


@dataclass(frozen=True)
class PrefixCache:
    """At most `max_bytes` of prefixes in a folder; the least recently used go first."""

    folder: Path
    max_bytes: int

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ValueError(f"prefix cache: expected at least 1 byte, got {self.max_bytes}")

    def read(self, key: str, num_bytes: int, fetch: Fetch) -> pa.Buffer:
        """The first bytes of a shard, from this folder as far as it has them.

        Args:
            key: Hash of the shard's whole content.
            num_bytes: Number of bytes wanted.
            fetch: Fetches a byte range of the remote shard.

        Raises:
            OSError: From `fetch`, or if the folder cannot be created or locked.
        """
        found = self._held(key, num_bytes)
        if found.size == num_bytes:
            return found
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(f"fetch-{key[:2]}"):
            found = self._held(key, num_bytes)  # another process may have fetched it meanwhile
            if found.size == num_bytes:
                return found
            missing = fetch(found.size, num_bytes - found.size)
            data = pa.py_buffer(b"".join((found, missing))) if found.size else missing
            self._keep(key, data)
        return data

    def drop(self, key: str) -> None:
        """Forget a shard, for example because its bytes here are damaged."""
        self._file(key).unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"

    def _held(self, key: str, num_bytes: int) -> pa.Buffer:
        """The wanted bytes as far as they are here, marked as used."""
        try:
            with self._file(key).open("rb") as file:
                os.utime(file.fileno())
                return pa.py_buffer(file.read(num_bytes))
        except FileNotFoundError:
            return pa.py_buffer(b"")

    def _keep(self, key: str, data: pa.Buffer) -> None:
        if data.size > self.max_bytes:
            return
        with self._locked("write"):
            for dead in self.folder.glob(".tmp-*"):  # nobody else is writing
                dead.unlink(missing_ok=True)
            self._make_room(data.size)
            temporary = self.folder / f".tmp-{uuid.uuid4().hex}"
            try:
                with temporary.open("xb") as file:
                    file.write(data)
                temporary.replace(self._file(key))
            except OSError as error:
                temporary.unlink(missing_ok=True)
                # The fetched bytes are in memory; if they cannot be kept, they are fetched again.
                logger.warning("prefix cache %s: %s; not kept", self.folder, error)

    def _make_room(self, num_bytes: int) -> None:
        files = [(file, file.stat()) for file in self.folder.glob(f"*{_SUFFIX}")]
        total = sum(stat.st_size for _, stat in files)
        for file, stat in sorted(files, key=lambda pair: pair[1].st_mtime_ns):
            if total + num_bytes <= self.max_bytes:
                return
            file.unlink(missing_ok=True)
            total -= stat.st_size

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold a lock across processes and threads; it ends with its process."""
        with (self.folder / f"{name}.lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
