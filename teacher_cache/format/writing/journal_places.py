"""Locations of a cache's journals: inside it, or on a local disk if it is remote.

FOLDER/w0.lock              held by the process that writes as worker w0
FOLDER/w0-00002.journal     its finished traces that are not yet in a shard
FOLDER/cache.txt            the cache these belong to, if the folder is not part of it

A journal outside the cache is announced in the cache as `journal/w0.open`, so that no other
machine seals without it.
"""

import hashlib
import json
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from teacher_cache.format.errors import CacheError, CacheMismatchError
from teacher_cache.format.files import fsync, make_folder, publish
from teacher_cache.format.folder_lock import FolderLock, InUseError
from teacher_cache.format.manifest import JOURNAL_FOLDER
from teacher_cache.format.store import CachePath, Store, identity

logger = logging.getLogger(__name__)

_OWNER_NAME = "cache.txt"


@dataclass(frozen=True)
class Journals:
    """The journals of one cache on this machine."""

    folder: Path
    store: Store
    inside: bool  # part of the cache itself

    def lock(self, worker: str) -> FolderLock:
        """Act as this worker until the lock is closed.

        Raises:
            CacheMismatchError: If another process acts as this worker.
        """
        try:
            return FolderLock(self.folder / f"{worker}.lock", keep=True)  # see `workers`
        except InUseError as error:
            raise CacheMismatchError(
                f"{self.store.where}: another process writes here as worker {worker!r} "
                f"({error.holder}); wait for it to end"
            ) from error

    def workers(self) -> list[str]:
        """Names of all workers that ever wrote here."""
        return sorted(file.stem for file in self.folder.glob("*.lock"))

    def names(self, worker: str) -> list[str]:
        """This worker's journals, oldest first."""
        return sorted(file.stem for file in self.folder.glob(f"{worker}-*.journal"))

    def file(self, name: str) -> Path:
        """Path of a journal."""
        return self.folder / f"{name}.journal"

    def remove(self, name: str) -> None:
        """Remove a journal whose traces are in a shard."""
        self.file(name).unlink()
        fsync(self.folder)

    def announce(self, worker: str) -> None:
        """Announce in the cache that this worker may have traces here, unseen by other machines."""
        if self.inside:
            return
        here = {"host": socket.gethostname(), "folder": str(self.folder)}
        before = self._announced(worker)
        if before not in (None, here):
            logger.warning(
                "%s: worker %s wrote from %s before; traces in its journal there are redone",
                self.store.where, worker, before,
            )  # fmt: skip
        logger.info("%s: finished traces wait in %s (--journal)", self.store.where, self.folder)
        self.store.make_folder(JOURNAL_FOLDER)
        self.store.publish(_open_name(worker), json.dumps(here).encode())

    def withdraw(self, worker: str) -> None:
        """Withdraw the announcement: this worker has nothing left here."""
        if not self.inside:
            self.store.remove(_open_name(worker))

    def require_all_finished(self) -> None:
        """Check that no journal elsewhere holds traces of this cache.

        Raises:
            CacheMismatchError: If one may; says which worker's and where.
        """
        for file in self.store.sizes(JOURNAL_FOLDER):
            if file.endswith(".open"):
                worker = file.removesuffix(".open")
                raise CacheMismatchError(
                    f"{self.store.where}: worker {worker!r} has not finished; its journal is in "
                    f"{self._announced(worker)}. Run its command again there, or seal there with "
                    f"--journal; without its traces: remove {_open_name(worker)} from the cache."
                )

    def _announced(self, worker: str) -> dict[str, str] | None:
        if self.store.size(_open_name(worker)) is None:
            return None
        found: dict[str, str] = json.loads(self.store.read(_open_name(worker)))
        return found


def open_journals(path: CachePath, store: Store, folder: Path | None) -> Journals:
    """Find the folder for a cache's journals, and create it if it is missing.

    Args:
        path: The cache as the user named it.
        store: The cache, opened.
        folder: Local folder for this cache's journals alone. By default `journal/` in a
            local cache, and one under the user's cache directory for a remote one.

    Raises:
        CacheMismatchError: If the folder holds another cache's journals.
    """
    inside = folder is None and store.folder is not None
    if inside:
        folder = Path(store.root) / JOURNAL_FOLDER
    elif folder is None:
        folder = _default_folder(path)
    make_folder(folder)
    if not inside:
        _require_owner(folder, identity(path))
    return Journals(folder, store, inside)


def _default_folder(path: CachePath) -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        base = Path(home) if home else Path.home() / ".cache"
    except RuntimeError as error:
        raise CacheError(
            "this user has no home folder to keep journals in; name a folder with --journal"
        ) from error
    return base / "leadspan" / hashlib.sha256(identity(path).encode()).hexdigest()[:16]


def _require_owner(folder: Path, owner: str) -> None:
    file = folder / _OWNER_NAME
    if not file.exists():
        publish(file, owner.encode())
    found = file.read_text()
    if found != owner:
        raise CacheMismatchError(
            f"{folder}: expected journals of {owner}, these are of {found}. Give every cache a "
            f"folder of its own; if the cache was only moved, remove {file}"
        )


def _open_name(worker: str) -> str:
    return f"{JOURNAL_FOLDER}/{worker}.open"
