"""A lock on a folder or file that one process at a time owns; it ends with the process.

It is a `flock` on a small file, so it ends with the last process that holds the open file, however
that one ends. The file's text says who holds it, for messages only.
"""

import errno
import fcntl
import json
import os
import re
import shlex
import socket
import sys
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from teacher_cache.format.files import naming

LOCK_NAME = "lock"  # file name, in a folder that one command owns
_MAX_COMMAND_CHARS = 160
_URI = re.compile(r"(\w+://)(?:[^/\s@]*@)?([^\s?#]*)\S*")  # with credentials and a query


class InUseError(BlockingIOError):
    """Another process holds the lock; the message says which, where, since when and which command.

    Attributes:
        holder: The part of the message that names the process.
    """

    def __init__(self, owned: object, holder: str) -> None:
        super().__init__(f"{owned}: in use by {holder}; wait for it to end, or stop it")
        self.holder = holder

    def __reduce__(self) -> tuple[type["InUseError"], tuple[object, str]]:
        """Pickle with all attributes."""
        return type(self), (str(self).partition(": in use by ")[0], self.holder)


class FolderLock:
    """A lock held until `close` or the end of the process; a context manager."""

    def __init__(
        self, file: Path, *, owned: Path | None = None, wait: bool = False, keep: bool = False
    ) -> None:
        """Take the lock; a missing folder for its file is created.

        Args:
            file: The lock's own file.
            owned: What the lock protects, for messages; by default the file's folder.
            wait: Wait until another process lets go, instead of refusing.
            keep: Keep the file when the lock ends. Otherwise it is removed, and so
                is a folder that was made for it and holds nothing else.

        Raises:
            InUseError: If another process has it.
            OSError: If the file cannot be written, or its file system does not support locks.
        """
        self._path = file
        self._keep = keep
        self._made_folder = False
        with naming(file):
            self._file = self._taken(owned or file.parent, wait)
            try:
                self._file.truncate(0)
                self._file.write(json.dumps(_this_process()).encode())
                self._file.flush()
            except BaseException:
                self._file.close()
                raise

    def _taken(self, owned: Path, wait: bool) -> BinaryIO:
        while True:
            file = self._opened()
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if _stands_at(file, self._path):
                    return file
            except BlockingIOError:
                holder = _holder(file)
                file.close()
                raise InUseError(owned, holder) from None
            except BaseException:
                file.close()
                raise
            file.close()  # its holder removed the file: try the new one

    def _opened(self) -> BinaryIO:
        while True:
            self._made_folder |= _make_folder(self._path.parent)
            try:
                return self._path.open("a+b")
            except FileNotFoundError:  # its folder was removed with another process's lock
                continue

    def fileno(self) -> int:
        """Descriptor of the open file: a child process that inherits it holds the lock too."""
        return self._file.fileno()

    def close(self) -> None:
        """Release the lock."""
        if self._file.closed:
            return
        if self._keep:
            self._file.truncate(0)  # nobody holds it now; the folder may be passed on
        elif _stands_at(self._file, self._path):
            self._path.unlink()
            if self._made_folder:
                _remove_if_empty(self._path.parent)
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _stands_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _make_folder(folder: Path) -> bool:
    """Make a folder; return whether it was missing."""
    try:
        folder.mkdir(parents=True)
        return True
    except FileExistsError:
        if folder.is_file() or (folder.is_symlink() and not folder.exists()):
            raise NotADirectoryError(
                f"{folder}: expected a folder, found a file; name another one"
            ) from None
        return False


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return  # another process has removed it
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise


def _this_process() -> dict[str, str | int]:
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    command = shlex.join(_URI.sub(r"\1\2", word) for word in words)
    if len(command) > _MAX_COMMAND_CHARS:
        command = f"{command[:_MAX_COMMAND_CHARS]}..."
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "command": command,
    }


def _holder(file: BinaryIO) -> str:
    file.seek(0)
    try:
        found = json.loads(file.read())
        return (
            f"process {found['pid']} on {found['host']} since {found['since']} ({found['command']})"
        )
    except (ValueError, KeyError, TypeError):  # the holder has not written this yet
        return "another process"
