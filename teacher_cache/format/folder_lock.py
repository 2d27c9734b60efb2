"""One process at a time: the lock of what a command owns, a folder or a file, released by death.

It is `flock`'s on a small file, so it ends with the last process that holds the open file, however
that one ends. What stands in the file says who holds it, for messages alone.
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

LOCK_NAME = "lock"  # of a folder that one command owns
_MAX_COMMAND_CHARS = 160
_URI = re.compile(r"(\w+://)(?:[^/\s@]*@)?([^\s?#]*)\S*")  # with credentials and a query


class InUseError(BlockingIOError):
    """Another process owns this; the message says which, where, since when and by what command.

    Attributes:
        holder: That part of the message.
    """

    def __init__(self, owned: object, holder: str) -> None:
        super().__init__(f"{owned}: in use by {holder}; wait for it to end, or stop it")
        self.holder = holder

    def __reduce__(self) -> tuple[type["InUseError"], tuple[object, str]]:
        """Travel to other processes whole."""
        return type(self), (str(self).partition(": in use by ")[0], self.holder)


class FolderLock:
    """A lock from its making to `close` or the death of the process; a context manager."""

    def __init__(
        self, file: Path, *, owned: Path | None = None, wait: bool = False, keep: bool = False
    ) -> None:
        """Take the lock; the folder of its file is made where there is none.

        Args:
            file: The lock's own file.
            owned: What the lock is of, in messages; by default the file's folder.
            wait: Wait until another process lets go, instead of refusing.
            keep: Leave the file where it is when the lock ends. It is taken away otherwise, and so
                is a folder that was made for it and holds nothing else.

        Raises:
            InUseError: If another process has it.
            OSError: If the file cannot be written, or its file system knows no locks.
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
            file.close()  # the one who had it took the file away: the next one counts

    def _opened(self) -> BinaryIO:
        while True:
            self._made_folder |= _make_folder(self._path.parent)
            try:
                return self._path.open("a+b")
            except FileNotFoundError:  # its folder went with another process' lock
                continue

    def fileno(self) -> int:
        """Of the open file: a child process that inherits it holds the lock too."""
        return self._file.fileno()

    def close(self) -> None:
        """Let go."""
        if self._file.closed:
            return
        if self._keep:
            self._file.truncate(0)  # nobody has it; and the folder may be given to others
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
    """Whether it had to be made."""
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
        return  # another process did
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
    except (ValueError, KeyError, TypeError):  # it has the lock, and has not written this yet
        return "another process"
