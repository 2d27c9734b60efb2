"""Moves damaged files out of a cache so that a capture recreates them. Deletes nothing.

A damaged catalogue needs no capture: it is made again from the commit records.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from teacher_cache.format.catalog import CATALOG_FILE
from teacher_cache.format.catalog_rows import catalog_of
from teacher_cache.format.checking.findings import Verification
from teacher_cache.format.errors import CacheMismatchError
from teacher_cache.format.files import fsync
from teacher_cache.format.header import UNUSABLE_JSON, CacheHeader
from teacher_cache.format.manifest import JOURNAL_FOLDER, MANIFEST_NAME, SHARD_FOLDER, Manifest
from teacher_cache.format.records import (
    MESSAGES_FOLDER,
    messages_file,
    read_commits,
    require_manifest,
)
from teacher_cache.format.shares import PARTS_FOLDER, publish_share, read_shares
from teacher_cache.format.store import CachePath, Store, open_store
from teacher_cache.format.writing.catalog_file import publish_catalog
from teacher_cache.format.writing.journal_places import Journals

REMOVED_FOLDER = "removed"


@dataclass(frozen=True)
class Repair:
    """Result of a repair."""

    removed: dict[str, str]  # file below the cache's root -> where it is now
    has_manifest: bool  # else `cache.json` is gone: it was damaged, and no shard gives its header
    has_new_catalog: bool = False  # and then the cache is whole again, and sealed


def repair_cache(path: CachePath, found: Verification) -> Repair:
    """Move damaged shards and their commit records out of the way, and remove the seal.

    The traces of these shards are then missing, and the command that made the cache captures them
    again. A process that dies here leaves an unsealed cache that can be repaired again.

    Args:
        path: The cache. No process may be writing to it; on a local disk this is checked.
        found: Result of `verify_cache`.

    Raises:
        CacheMismatchError: If a writer is active.
        OSError: If a file cannot be moved or written.
    """
    store = open_store(path)
    files = {finding.file for finding in found.errors}
    if files == {CATALOG_FILE}:
        with _no_writer(store):
            _make_catalog_again(store)
        return Repair({}, has_manifest=True, has_new_catalog=True)
    folders = (f"{SHARD_FOLDER}/", f"{MESSAGES_FOLDER}/")
    shards = sorted({PurePosixPath(f).stem for f in files if f.startswith(folders)})
    damaged = [
        *(f"{SHARD_FOLDER}/{name}.json" for name in shards),  # the records first
        *(f"{SHARD_FOLDER}/{name}.arrow" for name in shards),
        *(messages_file(name) for name in shards),
        *sorted(file for file in files if file.startswith(f"{JOURNAL_FOLDER}/")),
    ]
    parts = [f"{PARTS_FOLDER}/{name}" for name in store.sizes(PARTS_FOLDER)]
    damaged += parts if PARTS_FOLDER in files else []
    with _no_writer(store):
        prefix = _new_prefix(store)
        removed = {}
        if store.size(MANIFEST_NAME) is not None:
            removed[MANIFEST_NAME] = prefix + MANIFEST_NAME
            store.publish(removed[MANIFEST_NAME], store.read(MANIFEST_NAME))
        if found.header is not None:
            store.publish(MANIFEST_NAME, _unsealed(store, found.header).to_bytes())
        else:
            store.remove(MANIFEST_NAME)
        if damaged and PARTS_FOLDER not in files:
            _reopen_parts(store)
        for file in damaged:
            if store.size(file) is not None:
                is_asked = file.startswith(MESSAGES_FOLDER)
                kind = f"{MESSAGES_FOLDER}-" if is_asked else ""  # a shard has the same name
                removed[file] = prefix + kind + PurePosixPath(file).name
                _move(store, file, removed[file])
    return Repair(removed, has_manifest=found.header is not None)


def _make_catalog_again(store: Store) -> None:
    manifest = require_manifest(store)
    if manifest.seal is None:  # since it was verified: a catalogue is part of a seal
        raise CacheMismatchError(f"{store.where}: is no longer sealed; verify it again")
    names = [name for name, _ in manifest.seal.shards]
    commits = read_commits(store, names, manifest.header)
    file = publish_catalog(store, catalog_of(commits, manifest.header, store.where))
    seal = replace(manifest.seal, catalog=file)
    store.publish(MANIFEST_NAME, replace(manifest, seal=seal).to_bytes())


@contextmanager
def _no_writer(store: Store) -> Iterator[None]:
    """Hold the locks of all workers that ever wrote here."""
    with ExitStack() as stack:
        if store.folder is not None:
            journals = Journals(store.folder / JOURNAL_FOLDER, store, inside=True)
            for worker in journals.workers():
                stack.enter_context(journals.lock(worker))
        yield


def _new_prefix(store: Store) -> str:
    """Prefix for the file names of one repair, because shard names may recur."""
    store.make_folder(REMOVED_FOLDER)
    numbers = [name.partition("-")[0] for name in store.sizes(REMOVED_FOLDER)]
    last = max((int(number) for number in numbers if number.isdigit()), default=0)
    return f"{REMOVED_FOLDER}/{last + 1}-"


def _unsealed(store: Store, header: CacheHeader) -> Manifest:
    """New `cache.json` without a seal; the old one's record of the capture is kept."""
    try:
        config = json.loads(store.read(MANIFEST_NAME))["config"]
    except (FileNotFoundError, *UNUSABLE_JSON):
        config = {}
    return Manifest(header, config if isinstance(config, dict) else {})


def _reopen_parts(store: Store) -> None:
    """Mark workers that share an input as unfinished: some of their traces are now missing."""
    for part, record in read_shares(store).items():
        publish_share(store, part, replace(record, finished=False))


def _move(store: Store, file: str, target: str) -> None:
    if store.folder is None:
        store.publish(target, store.read(file))
        store.remove(file)
        return
    source = store.folder / file
    source.rename(store.folder / target)  # needs no room on a full disk
    fsync(source.parent)
    fsync((store.folder / target).parent)
