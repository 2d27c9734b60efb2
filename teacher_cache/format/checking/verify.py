"""Checks every checksum, count and guarantee of a cache and lists everything that is wrong.

One shard is in memory at a time.
"""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from teacher_cache.format.catalog import CATALOG_FILE, Catalog
from teacher_cache.format.catalog_rows import catalog_of
from teacher_cache.format.checking.findings import Verification
from teacher_cache.format.checking.verify_shard import broken_shard, header_in_shard
from teacher_cache.format.commit import PLAIN_NAME, ShardCommit, check_commit, parse_commit
from teacher_cache.format.errors import CacheError, CacheFormatError
from teacher_cache.format.header import UNUSABLE_JSON, CacheHeader, canonical_json, content_hash
from teacher_cache.format.manifest import (
    JOURNAL_FOLDER,
    MANIFEST_NAME,
    SHARD_FOLDER,
    Manifest,
    Seal,
    parse_manifest,
)
from teacher_cache.format.reading.catalog_file import sealed_catalog
from teacher_cache.format.reading.messages import read_messages
from teacher_cache.format.records import messages_file
from teacher_cache.format.shares import PARTS_FOLDER, read_shares
from teacher_cache.format.store import CachePath, Store, open_store
from teacher_cache.format.writing.journal import journal_damage, read_journal

OnBytes = Callable[[int, int], None]  # (bytes checked, bytes in all)


def verify_cache(path: CachePath, on_bytes: OnBytes = lambda done, total: None) -> Verification:
    """Check a cache, sealed or not, even while it is being written.

    Args:
        path: A folder, or a URI that pyarrow.fs knows.
        on_bytes: Called after every shard.

    Raises:
        CacheError: If there is nothing to check, or the cache cannot be opened.
    """
    store = open_store(path)
    shard_files = set(store.sizes(SHARD_FOLDER))
    records = {file.removesuffix(".json") for file in shard_files if file.endswith(".json")}
    if store.size(MANIFEST_NAME) is None and not records:
        raise CacheFormatError(f"{store.where}: no cache here (expected a file {MANIFEST_NAME})")
    found = Verification(store.where)
    manifest, has_checksum = _check_manifest(store, found)
    seal = None if manifest is None else manifest.seal
    found.sealed = seal is not None
    listed = records if seal is None else {name for name, _ in seal.shards}
    read = (_read_commit(store, name, found) for name in sorted(listed))
    commits = [commit for commit in read if commit is not None]
    if manifest is not None and not has_checksum and not _is_of_shards(manifest, commits, found):
        manifest = None
    header = _header(store, commits) if manifest is None else manifest.header
    found.header = header
    total = sum(commit.size_bytes for commit in commits)
    for commit in commits:
        _check_shard(store, commit, header, found)
        on_bytes(found.num_bytes, total)
    if header is not None:
        _count(store, manifest, header, commits, len(listed), found)
    _check_copies(commits, found)
    _note_strays(shard_files, listed, found)
    try:
        read_shares(store)
    except CacheFormatError as error:
        found.wrong(PARTS_FOLDER, str(error).removeprefix(f"{store.where}/"))
    if header is not None and store.folder is not None:
        _check_journals(store.folder, header, listed, found)
    return found


def _check_manifest(store: Store, found: Verification) -> tuple[Manifest | None, bool]:
    """`cache.json` if nothing is wrong with it, and whether a checksum confirms that."""
    try:
        text = store.read(MANIFEST_NAME)
        damage = _manifest_damage(text)
    except FileNotFoundError:
        damage = "is missing although shards exist"
    except (OSError, *UNUSABLE_JSON) as error:
        damage = f"not readable: {error}"
    if damage is not None:
        found.wrong(MANIFEST_NAME, damage)
        return None, False
    has_checksum = "checksum" in json.loads(text.decode())
    try:
        manifest = parse_manifest(text, f"{found.path}/{MANIFEST_NAME}")
    except CacheFormatError as error:
        if has_checksum:
            raise  # intact, but written by a later version
        found.wrong(MANIFEST_NAME, str(error).removeprefix(f"{found.path}/"))
        return None, False
    if not has_checksum:
        found.note(MANIFEST_NAME, "has no checksum: damage to its `config` would go unseen")
    return manifest, has_checksum


def _manifest_damage(text: bytes) -> str | None:
    record: dict[str, Any] = json.loads(text.decode())

    def hash_without(name: str) -> str:
        return content_hash({key: value for key, value in record.items() if key != name})

    checksum = record.get("checksum")
    if checksum is not None and checksum != hash_without("checksum"):
        return f"its checksum {checksum!r} does not match its content"
    for name, value in record.items():
        if name != "checksum" and isinstance(value, str) and value == hash_without(name):
            return f"expected the key `checksum`, found {name!r} instead"
    return _case_damage(text, json.dumps(record, indent=1).encode())


def _case_damage(text: bytes, *spellings: bytes) -> str | None:
    """Detect a flipped bit that no value shows: JSON ignores case in `\\u00e9` and `1e-05`."""
    found = text.strip()
    if found not in spellings and found.lower() in (each.lower() for each in spellings):
        return "a letter of an escape or a number has changed its case"
    return None


def _read_commit(store: Store, name: str, found: Verification) -> ShardCommit | None:
    file = f"{SHARD_FOLDER}/{name}.json"
    if not PLAIN_NAME.match(name):
        found.wrong(file, f"{name!r} is not a valid shard name")
        return None
    try:
        text = store.read(file)
        commit = parse_commit(text, name)
    except FileNotFoundError:
        found.wrong(file, "the seal lists this commit record, but it is missing")
        return None
    except (OSError, CacheFormatError) as error:
        found.wrong(file, error)
        return None
    record = json.loads(text)
    # That of today's writer, and that of earlier ones.
    damage = _case_damage(text, canonical_json(record), json.dumps(record).encode())
    if damage is not None:
        found.wrong(file, damage)
    return commit


def _is_of_shards(manifest: Manifest, commits: Sequence[ShardCommit], found: Verification) -> bool:
    """Check a header without a checksum against the shards; if none has it, it is damaged."""
    fingerprint = manifest.header.fingerprint
    of_shards = {commit.header_fingerprint for commit in commits} or {fingerprint}
    if fingerprint in of_shards or len(of_shards) > 1:
        return True
    found.wrong(
        MANIFEST_NAME, f"its header {fingerprint} is not that of the shards, {of_shards.pop()}"
    )
    return False


def _header(store: Store, commits: Sequence[ShardCommit]) -> CacheHeader | None:
    """The header stored in the shards, for a damaged `cache.json`."""
    for commit in commits:
        try:
            return header_in_shard(store.read(_shard_file(commit)), commit)
        except (OSError, CacheError):  # listed where this shard is checked
            continue
    return None


def _shard_file(commit: ShardCommit) -> str:
    return f"{SHARD_FOLDER}/{commit.name}.arrow"


def _check_shard(
    store: Store, commit: ShardCommit, header: CacheHeader | None, found: Verification
) -> None:
    if header is not None:
        try:
            check_commit(commit, header)
        except CacheError as error:
            found.wrong(f"{SHARD_FOLDER}/{commit.name}.json", error)
            header = None  # this header says nothing about its values
    file = _shard_file(commit)
    try:
        data = store.read(file)
    except FileNotFoundError:
        found.wrong(file, "is missing although its commit record exists")
        return
    except OSError as error:
        found.wrong(file, f"cannot be read: {error}")
        return
    found.num_shards += 1
    found.num_bytes += len(data)
    found.num_entries += commit.num_entries
    for problem in broken_shard(data, commit, header, file):
        found.wrong(file, problem)
    try:
        asked = read_messages(store, commit)
    except CacheFormatError as error:
        found.wrong(messages_file(commit.name), str(error).removeprefix(f"{store.where}: "))
        return
    if strangers := asked.keys() - {trace.trace_id for trace in commit.traces}:
        found.wrong(
            messages_file(commit.name), f"holds {min(strangers)!r}, not a trace of the shard"
        )


def _count(
    store: Store,
    manifest: Manifest | None,
    header: CacheHeader,
    commits: Sequence[ShardCommit],
    num_listed: int,
    found: Verification,
) -> None:
    catalog = catalog_of(commits, header, found.path)
    actual = catalog.seal(None)
    found.num_traces, found.num_tokens = actual.num_traces, actual.num_tokens
    found.num_duplicates = actual.num_duplicates
    if manifest is None or manifest.seal is None:
        return
    checksums = dict(manifest.seal.shards)
    for commit in commits:
        if commit.checksum != checksums[commit.name]:
            found.wrong(f"{SHARD_FOLDER}/{commit.name}.json", "differs from the sealed one")
    if len(commits) < num_listed:
        return  # already reported, and the totals must differ
    for name in ("num_traces", "num_tokens", "num_duplicates"):
        expected, counted = getattr(manifest.seal, name), getattr(actual, name)
        if expected != counted:
            found.wrong(MANIFEST_NAME, f"the seal says {name} {expected:,}, counted {counted:,}")
    if manifest.seal.catalog is not None and catalog.shard_list == manifest.seal.shards:
        # A wrong total is reported already.
        seal = replace(manifest.seal, num_traces=actual.num_traces)
        _check_catalog(store, manifest, seal, catalog, found)


def _check_catalog(
    store: Store, manifest: Manifest, seal: Seal, actual: Catalog, found: Verification
) -> None:
    """Check that the catalogue says what the commit records say."""
    try:
        catalog = sealed_catalog(store, manifest, seal)
        for shard in range(actual.num_shards):
            if catalog.commit(shard).content != actual.commit(shard).content:
                name = actual.shard_list[shard][0]
                found.wrong(CATALOG_FILE, f"differs from the commit record of shard {name}")
                return
        if not np.array_equal(catalog.counted, actual.counted):
            found.wrong(CATALOG_FILE, "does not count the traces that the shards hold")
    except CacheFormatError as error:
        found.wrong(CATALOG_FILE, str(error).removeprefix(f"{found.path}/{CATALOG_FILE}: "))


def _check_copies(commits: Sequence[ShardCommit], found: Verification) -> None:
    """Two workers may capture one trace, but only from the same input."""
    first: dict[str, tuple[str, str]] = {}
    for commit in commits:
        for trace in commit.traces:
            source_hash, shard = first.setdefault(trace.trace_id, (trace.source_hash, commit.name))
            if source_hash != trace.source_hash:
                found.wrong(
                    f"{SHARD_FOLDER}/{commit.name}.json",
                    f"trace {trace.trace_id!r} was made from other content than in {shard}",
                )


def _note_strays(files: Collection[str], listed: Collection[str], found: Verification) -> None:
    for file in sorted(files):
        stem, _, kind = file.rpartition(".")
        where = f"{SHARD_FOLDER}/{file}"
        if file.startswith(".tmp-"):
            found.note(where, "a writer's temporary file; remove it if no writer is active")
        elif stem in listed and kind in ("json", "arrow"):
            continue
        elif f"{stem}.json" in files and kind in ("json", "arrow"):
            found.note(where, "came after the seal and does not count")
        elif kind == "arrow":
            found.note(where, "has no commit record and does not count: its writer was interrupted")
        else:
            found.note(where, "is not a file of a cache")


def _check_journals(
    root: Path, header: CacheHeader, listed: Collection[str], found: Verification
) -> None:
    for path in sorted((root / JOURNAL_FOLDER).glob("*.journal")):
        file = f"{JOURNAL_FOLDER}/{path.name}"
        try:
            num_traces = sum(1 for _ in read_journal(path, header.fingerprint))
            damage = journal_damage(path, header.fingerprint)
        except FileNotFoundError:
            continue  # a running writer has since turned it into a shard
        except (OSError, CacheFormatError) as error:
            found.wrong(file, str(error).removeprefix(f"{path}: "))
            continue
        if path.stem in listed:
            found.note(file, "is left over from a finished shard; the next capture removes it")
            continue
        found.num_journalled += num_traces
        if damage:
            num_bytes = sum(end - start for start, end in damage)
            found.note(
                file,
                f"{num_traces:,} whole traces, and {num_bytes:,} damaged bytes, from byte "
                f"{damage[0][0]:,}: the next capture recreates what was there",
            )
