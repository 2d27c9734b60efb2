"""The records of a cache in its store: `cache.json` and the commit records of shards."""

from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from teacher_cache.format.commit import PLAIN_NAME, ShardCommit, check_commit, parse_commit
from teacher_cache.format.errors import CacheFormatError, CacheMismatchError, repair_advice
from teacher_cache.format.header import CacheHeader
from teacher_cache.format.manifest import MANIFEST_NAME, SHARD_FOLDER, Manifest, parse_manifest
from teacher_cache.format.store import CachePath, Store, open_store

OnRecord = Callable[[int, int], None]  # (records read, records in all)

MESSAGES_FOLDER = "messages"
_NUM_READERS = 16  # records of a remote cache fetched at a time


def read_manifest(path: CachePath | Store) -> Manifest | None:
    """The `cache.json` of a folder or URI; None if it is missing.

    Raises:
        CacheFormatError: If it is damaged.
        OSError: If it exists and cannot be read.
    """
    store = path if isinstance(path, Store) else open_store(path)
    try:
        text = store.read(MANIFEST_NAME)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return parse_manifest(text, f"{store.where}/{MANIFEST_NAME}")


def require_manifest(store: Store) -> Manifest:
    """The `cache.json` of a cache that must exist.

    Raises:
        CacheFormatError: If it is missing or damaged.
    """
    manifest = read_manifest(store)
    if manifest is None:
        raise CacheFormatError(f"{store.where}: no cache here (expected a file {MANIFEST_NAME})")
    return manifest


def require_same_capture(where: str, header: CacheHeader, found: CacheHeader) -> None:
    """Refuse to write into another capture's cache.

    Args:
        where: The cache, for the message.
        header: Header of the capture that is to write.
        found: Header of the cache.

    Raises:
        CacheMismatchError: Names every fact in which the headers differ.
    """
    if header.fingerprint != found.fingerprint:
        differences = "; ".join(header.differences(found))
        raise CacheMismatchError(
            f"{where} holds another capture ({differences}). "
            "Write to another folder, or repeat that capture's settings."
        )


def committed_names(store: Store) -> list[str]:
    """Names of every shard that has a commit record, sorted."""
    files = store.sizes(SHARD_FOLDER)
    return sorted(name.removesuffix(".json") for name in files if name.endswith(".json"))


def read_commits(
    store: Store,
    names: Collection[str],
    header: CacheHeader,
    on_record: OnRecord = lambda done, total: None,
) -> Iterator[ShardCommit]:
    """Yield the commit records of these shards, checked against the cache's header.

    Args:
        store: The cache.
        names: Names of the shards.
        header: The cache's header.
        on_record: Called after every record, with their number so far and in all.

    Raises:
        CacheFormatError: If one is missing or damaged.
        CacheMismatchError: If one belongs to another capture.
    """
    advice = f"; {repair_advice(store.where)}"

    def read(name: str) -> ShardCommit:
        if not PLAIN_NAME.match(name):
            raise CacheFormatError(f"{store.where}: {name!r} is not a valid shard name")
        try:
            text = store.read(commit_file(name))
        except FileNotFoundError as error:
            raise CacheFormatError(
                f"{store.where}: the commit record of shard {name!r} is missing{advice}"
            ) from error
        commit = parse_commit(text, name, advice)
        check_commit(commit, header)
        return commit

    def counted(commits: Iterable[ShardCommit]) -> Iterator[ShardCommit]:
        for number, commit in enumerate(commits, start=1):
            on_record(number, len(names))
            yield commit

    if store.folder is not None:
        yield from counted(map(read, names))
        return
    with ThreadPoolExecutor(_NUM_READERS) as pool:  # fetching one by one would be mostly latency
        yield from counted(pool.map(read, names))


def commit_file(name: str) -> str:
    """Path of a shard's commit record."""
    return f"{SHARD_FOLDER}/{name}.json"


def shard_file(name: str) -> str:
    """Path of a shard's bytes."""
    return f"{SHARD_FOLDER}/{name}.arrow"


def messages_file(name: str) -> str:
    """Path of the messages that a shard's traces answer."""
    return f"{MESSAGES_FOLDER}/{name}.arrow"
