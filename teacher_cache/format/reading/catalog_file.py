"""Reading `catalog.parquet`; a cache without a usable one is opened by its commit records."""

import hashlib
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from teacher_cache.format.catalog import CATALOG_FILE, Catalog
from teacher_cache.format.catalog_rows import catalog_of
from teacher_cache.format.checksums import sha256_of
from teacher_cache.format.errors import CacheFormatError
from teacher_cache.format.manifest import Manifest, Seal
from teacher_cache.format.records import read_commits
from teacher_cache.format.store import Store

logger = logging.getLogger(__name__)


def open_catalog(store: Store, manifest: Manifest, names: list[str]) -> Catalog:
    """The catalogue of these shards, from its file where the seal covers it.

    Raises:
        CacheFormatError: If there is no usable file, and a commit record is missing or damaged.
        CacheMismatchError: If a commit record belongs to another capture.
        OSError: If a file exists and cannot be read.
    """
    seal = manifest.seal
    if seal is not None and seal.catalog is not None and names == [name for name, _ in seal.shards]:
        try:
            return sealed_catalog(store, manifest, seal)
        except CacheFormatError as error:
            # Nothing differs but the time it takes: the records hold the same facts.
            logger.warning("%s; reading every commit record instead", error)
    commits = read_commits(store, names, manifest.header)
    return catalog_of(commits, manifest.header, store.where)


def sealed_catalog(store: Store, manifest: Manifest, seal: Seal) -> Catalog:
    """The catalogue as it was sealed.

    Raises:
        CacheFormatError: If it is missing, damaged, or of other shards than the seal's.
    """
    where = f"{store.where}/{CATALOG_FILE}"
    try:
        source, sha256 = _opened(store)
    except FileNotFoundError as error:
        raise CacheFormatError(f"{where}: is missing") from error
    if seal.catalog is None or sha256 != seal.catalog.sha256:
        raise CacheFormatError(f"{where}: is not the sealed one")
    try:
        catalog = Catalog(pq.ParquetFile(source), manifest.header, where)
    except (pa.ArrowException, OSError) as error:
        raise CacheFormatError(f"{where}: not readable as Parquet: {error}") from error
    if catalog.shard_list != seal.shards or len(catalog.counted) != seal.num_traces:
        raise CacheFormatError(f"{where}: holds other shards or traces than the seal lists")
    return catalog


def _opened(store: Store) -> tuple[Path | pa.Buffer, str]:
    """The file, and its sha256; a local one stays on the disk, for columns are read when needed."""
    if store.folder is not None:
        file = store.folder / CATALOG_FILE
        return file, sha256_of(file)
    data = store.read(CATALOG_FILE)
    return pa.py_buffer(data), hashlib.sha256(data).hexdigest()
