"""Taking what is damaged out of a cache, so that a capture makes it again. Nothing is deleted."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from teacher_cache.format.errors import CacheError, CacheMismatchError
from teacher_cache.format.files import fsync_folder, publish
from teacher_cache.format.findings import Verification
from teacher_cache.format.header import UNUSABLE_JSON, CacheHeader
from teacher_cache.format.manifest import (
    JOURNAL_FOLDER,
    MANIFEST_NAME,
    SHARD_FOLDER,
    Manifest,
)

REMOVED_FOLDER = "removed"


@dataclass(frozen=True)
class Repair:
    """What was done to a cache."""

    removed: tuple[str, ...]  # files below the cache's folder
    to: str  # where they are now, below the cache's folder
    has_manifest: bool  # else `cache.json` is gone: it was damaged, and no shard gives its header


def repair_cache(found: Verification) -> Repair:
    """Move damaged shards with their commit records out of the way, and take the seal off.

    The traces of these shards are then missing, and the command that made the cache captures them
    again. A process that dies here leaves an unsealed cache that can be repaired again.

    Args:
        found: What `verify_cache` found, of a cache on a local disk.

    Raises:
        CacheMismatchError: If a writer is at work.
        CacheError: If the cache is not on a local disk.
    """
    if "://" in found.path:
        raise CacheError(
            f"{found.path}: only a cache on a local disk can be repaired; copy it to one first"
        )
    folder = Path(found.path)
    files = {finding.file for finding in found.errors}
    shards = {Path(file).stem for file in files if file.startswith(f"{SHARD_FOLDER}/")}
    damaged = [
        *(f"{SHARD_FOLDER}/{name}.json" for name in sorted(shards)),  # the records first
        *(f"{SHARD_FOLDER}/{name}.arrow" for name in sorted(shards)),
        *sorted(file for file in files if file.startswith(f"{JOURNAL_FOLDER}/")),
    ]
    with _no_writer(folder):
        target = _new_folder(folder / REMOVED_FOLDER)
        if (folder / MANIFEST_NAME).exists():
            publish(target / MANIFEST_NAME, (folder / MANIFEST_NAME).read_bytes())
        if found.header is not None:
            publish(folder / MANIFEST_NAME, _unsealed(folder, found.header).to_bytes())
        else:
            (folder / MANIFEST_NAME).unlink(missing_ok=True)
        removed = [file for file in damaged if (folder / file).exists()]
        for file in removed:
            (folder / file).rename(target / Path(file).name)
        for changed in (SHARD_FOLDER, JOURNAL_FOLDER, target):
            if (folder / changed).is_dir():
                fsync_folder(folder / changed)
    return Repair(
        removed=tuple(removed),
        to=f"{REMOVED_FOLDER}/{target.name}",
        has_manifest=found.header is not None,
    )


@contextmanager
def _no_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of everybody who ever wrote here."""
    with ExitStack() as stack:
        for path in sorted((folder / JOURNAL_FOLDER).glob("*.lock")):
            lock = stack.enter_context(path.open("r+"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CacheMismatchError(
                    f"{folder}: worker {path.stem!r} is writing here; stop it or wait for its end"
                ) from None
        yield


def _new_folder(removed: Path) -> Path:
    """A folder of its own for each repair: names of shards may come again."""
    numbers = [int(path.name) for path in removed.glob("*") if path.name.isdigit()]
    target = removed / str(max(numbers, default=0) + 1)
    target.mkdir(parents=True)
    return target


def _unsealed(folder: Path, header: CacheHeader) -> Manifest:
    """A new `cache.json` without a seal; what the old one says of the capture is kept."""
    try:
        config = json.loads((folder / MANIFEST_NAME).read_bytes())["config"]
    except (FileNotFoundError, *UNUSABLE_JSON):
        config = {}
    return Manifest(header, config if isinstance(config, dict) else {})
