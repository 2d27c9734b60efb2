"""Sealing: declaring a cache complete."""

from collections.abc import Collection
from pathlib import Path

from teacher_cache.format.catalog import Catalog
from teacher_cache.format.catalog_rows import catalog_of
from teacher_cache.format.errors import CacheMismatchError
from teacher_cache.format.header import CacheHeader
from teacher_cache.format.manifest import MANIFEST_NAME, SHARD_FOLDER, Manifest
from teacher_cache.format.noise import read_noise
from teacher_cache.format.records import (
    OnRecord,
    committed_names,
    read_commits,
    require_manifest,
)
from teacher_cache.format.shares import require_all_parts
from teacher_cache.format.store import CachePath, Store, open_store
from teacher_cache.format.writing.card import publish_card
from teacher_cache.format.writing.catalog_file import publish_catalog
from teacher_cache.format.writing.journal_places import open_journals
from teacher_cache.format.writing.writer import CacheWriter


def seal_cache(
    path: CachePath,
    *,
    journal: Path | None = None,
    allow_missing: bool = False,
    known: Collection[str] = (),
    on_record: OnRecord = lambda done, total: None,
) -> Manifest:
    """Declare a cache complete: compact the remaining journals and list its shards.

    No writer may be active. Sealing a sealed cache changes nothing.

    Args:
        path: A folder, or a URI that pyarrow.fs knows.
        journal: Folder of the journals, if not the default one.
        allow_missing: Seal even if workers that share an input have not all finished it.
        known: Ids of traces that must be in the cache. A store whose lists lag behind its
            files may not show their shards yet.
        on_record: Called after every commit record, with their number so far and in all.

    Raises:
        CacheMismatchError: If a worker is still writing, has a journal elsewhere, or has not
            finished its part of the input, or if shards came after the seal or are not listed.
        CacheError: If a commit record is damaged or of another capture.
        OSError: If the seal cannot be written.
    """
    store = open_store(path)
    manifest = require_manifest(store)
    if manifest.seal is not None:
        later = set(committed_names(store)) - dict(manifest.seal.shards).keys()
        if later:
            raise CacheMismatchError(
                f"{store.where}: shard {min(later)} came after the seal and does not count; "
                "move the shards that came later into a cache of their own"
            )
        return manifest
    if not allow_missing:
        require_all_parts(store)
    compact_journals(path, manifest.header, journal=journal)
    journals = open_journals(path, store, journal)
    journals.require_all_finished()
    for folder in ("", SHARD_FOLDER):
        store.remove_unpublished(folder)
    commits = read_commits(store, committed_names(store), manifest.header, on_record)
    catalog = catalog_of(commits, manifest.header, store.where)
    _require_known(store, catalog, known)
    noise = read_noise(store)
    seal = catalog.seal(publish_catalog(store, catalog))
    publish_card(store, manifest.header, seal)
    sealed = Manifest(manifest.header, manifest.config, seal, noise)
    store.publish(MANIFEST_NAME, sealed.to_bytes())
    return sealed


def _require_known(store: Store, catalog: Catalog, known: Collection[str]) -> None:
    lacking = set(known).difference(catalog.trace_ids(catalog.counted))
    if lacking:
        raise CacheMismatchError(
            f"{store.where}: its list of shards lacks {len(lacking):,} traces that were written, "
            f"such as {min(lacking)!r}: the store's lists lag behind. Nothing is lost; run the "
            "same command again in a minute"
        )


def compact_journals(path: CachePath, header: CacheHeader, *, journal: Path | None = None) -> None:
    """Compact the remaining journals; nobody may be writing. Raises as `seal_cache`."""
    for worker in open_journals(path, open_store(path), journal).workers():
        CacheWriter(path, header, worker=worker, journal=journal).finish()
