"""CacheWriter: finished traces -> journal -> shards -> seal. A kill at any moment loses no trace.

DIR/cache.json              header; sealed at the end
DIR/journal/w0-00002.journal    finished traces that do not fill a shard yet
DIR/shards/w0-00001.arrow   published, and trusted once its commit record is there:
DIR/shards/w0-00001.json
"""

import fcntl
import hashlib
import logging
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from teacher_cache.format.commit import ShardCommit, TraceInfo, check_commit, parse_commit
from teacher_cache.format.errors import CacheFormatError, CacheMismatchError
from teacher_cache.format.files import fsync_folder, publish
from teacher_cache.format.header import CacheHeader
from teacher_cache.format.journal import FinishedTrace, Journal, read_journal
from teacher_cache.format.manifest import (
    JOURNAL_FOLDER,
    MANIFEST_NAME,
    SHARD_FOLDER,
    Manifest,
    make_seal,
    parse_manifest,
)
from teacher_cache.format.shard import encode_shard
from teacher_cache.format.trace import MAX_K

logger = logging.getLogger(__name__)

SHARD_BYTES = 24 << 20  # a dictionary of 100,000 ids is then below 1.5 % of it
_WORKER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_]*\Z")  # `-` ends it in a shard's name
SYNC_INTERVAL_S = 2.0  # what a dying machine (not process) may cost


class CacheWriter:
    """One worker's way into a cache; several workers may write into one folder at the same time."""

    def __init__(
        self,
        path: Path,
        header: CacheHeader,
        *,
        config: Mapping[str, Any] | None = None,
        worker: str = "w0",
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Open a cache for writing; it is made where there is none, and gone on with where it is.

        Args:
            path: The cache's folder.
            header: What every writer of this cache must agree on.
            config: The capture's resolved configuration, kept in `cache.json` for the reader.
            worker: Name that no other process uses at the same time: letters, digits and `_`.
            shard_bytes: A shard is closed when its journal has about this size.

        Raises:
            CacheMismatchError: If the folder holds another capture's cache, or another process
                writes as this worker.
            CacheFormatError: If the folder's own files are damaged.
        """
        if not _WORKER_NAME.match(worker):
            raise ValueError(f"worker: expected letters, digits and _ alone, got {worker!r}")
        self.path = path
        self.header = header
        self._worker = worker
        self._shard_bytes = shard_bytes
        for folder in (path, path / SHARD_FOLDER, path / JOURNAL_FOLDER):
            folder.mkdir(parents=True, exist_ok=True)
        self.manifest = self._open_manifest(config or {})
        self.require_header(header)
        self._lock = (path / JOURNAL_FOLDER / f"{worker}.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise CacheMismatchError(
                f"{path}: another process writes here as worker {worker!r}; wait for it to end"
            ) from None
        self._compactor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compact")
        self._compaction: Future[None] | None = None
        self._journal: Journal | None = None  # opened by the first trace
        self._finished = {
            trace.trace_id: trace.source_hash
            for commit in read_commits(path, header)
            for trace in commit.traces
        }
        self._recover()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def require_header(self, header: CacheHeader) -> None:
        """Refuse to write what another capture made.

        Raises:
            CacheMismatchError: Naming every fact in which the headers differ.
        """
        if header.fingerprint != self.manifest.header.fingerprint:
            differences = "; ".join(header.differences(self.manifest.header))
            raise CacheMismatchError(
                f"{self.path} holds another capture ({differences}). "
                "Write to another folder, or repeat that capture's settings."
            )

    def _open_manifest(self, config: Mapping[str, Any]) -> Manifest:
        manifest = read_manifest(self.path)
        if manifest is None:
            manifest = Manifest(self.header, config)
            publish(self.path / MANIFEST_NAME, manifest.to_bytes())
        return manifest

    def _recover(self) -> None:
        """Take up the journals of this worker where an earlier process left them."""
        folder = self.path / JOURNAL_FOLDER
        names = sorted(file.stem for file in folder.glob(f"{self._worker}-*.journal"))
        for name in names:
            if (self.path / SHARD_FOLDER / f"{name}.json").exists():
                _remove_journal(self.path, name)  # died between the commit record and this
        names = [name for name in names if (folder / f"{name}.journal").exists()]
        for name in names[:-1]:  # full, but not compacted any more
            self._finished |= _journalled(self.path, name, self.header)
            compact(self.path, name, self.header)
        if names:
            self._open_journal(names[-1])

    def _next_name(self) -> str:
        used = [
            int(file.stem.rpartition("-")[2])
            for folder in (SHARD_FOLDER, JOURNAL_FOLDER)
            for file in (self.path / folder).glob(f"{self._worker}-*")
        ]
        return f"{self._worker}-{max(used, default=-1) + 1:05d}"

    def _open_journal(self, name: str) -> Journal:
        file = self.path / JOURNAL_FOLDER / f"{name}.journal"
        self._journal = Journal(file, self.header.fingerprint)
        self._name = name
        self._num_journalled = 0
        self._synced_at_s = time.monotonic()
        for finished in read_journal(file, self.header.fingerprint):
            self._note(finished)
        return self._journal

    def _note(self, finished: FinishedTrace) -> None:
        self._finished[finished.trace.trace_id] = finished.source_hash
        self._num_journalled += 1

    @property
    def sealed(self) -> bool:
        """Whether the cache is complete; nothing can be added then."""
        return self.manifest.seal is not None

    def finished(self) -> Mapping[str, str]:
        """trace_id -> source_hash of every trace that the cache holds already."""
        return self._finished

    def append(self, finished: FinishedTrace) -> None:
        """Keep one finished trace.

        Raises:
            ValueError: If the trace breaks an invariant or is there already.
            OSError: If it cannot be written; everything appended before is kept.
        """
        trace = finished.trace
        trace.validate()
        num_held = self.header.num_held(trace.n_total)
        if len(trace.token_ids) != num_held:
            raise ValueError(
                f"trace {trace.trace_id!r}: expected all {num_held} tokens that the cache holds of "
                f"it, got {len(trace.token_ids)}"
            )
        if int(trace.k.max()) > MAX_K + 1:
            raise ValueError(f"trace {trace.trace_id!r}: more than {MAX_K + 1} entries for a token")
        highest = max(int(trace.token_ids.max()), int(trace.top_ids.max(initial=0)))
        if highest >= self.header.vocab_size:
            raise ValueError(
                f"trace {trace.trace_id!r}: token id {highest} is outside the teacher's "
                f"vocabulary of {self.header.vocab_size}"
            )
        if trace.trace_id in self._finished:
            raise ValueError(f"trace {trace.trace_id!r} is in the cache already")
        if self.sealed:
            raise ValueError(f"{self.path} is sealed; nothing can be added")
        journal = self._journal or self._open_journal(self._next_name())
        journal.append(finished)
        self._note(finished)
        if journal.num_bytes >= self._shard_bytes:
            self._roll(journal)
        elif time.monotonic() - self._synced_at_s >= SYNC_INTERVAL_S:
            journal.sync()
            self._synced_at_s = time.monotonic()

    def _roll(self, journal: Journal) -> None:
        """Hand the full journal to the compacting thread; the next trace begins another."""
        journal.close()
        self._journal = None
        self._wait_for_compaction()  # at most one journal waits: a slow disk slows the capture
        self._compaction = self._compactor.submit(compact, self.path, self._name, self.header)

    def _wait_for_compaction(self) -> None:
        compaction, self._compaction = self._compaction, None
        if compaction is not None:
            compaction.result()  # an error in the thread is an error of the capture

    def close(self) -> None:
        """Stop writing; the journal stays and the next writer of this worker goes on with it."""
        try:
            if self._journal is not None:
                self._journal.close()
                self._journal = None
            self._wait_for_compaction()
        finally:
            self._compactor.shutdown()
            self._lock.close()

    def finish(self) -> None:
        """Compact what is in the journal too, so that readers see every trace; then close."""
        with self:
            if self._journal is not None and self._num_journalled:
                self._roll(self._journal)
            elif self._journal is not None:
                _remove_journal(self.path, self._name)


def read_manifest(path: Path) -> Manifest | None:
    """The `cache.json` of a folder; None where there is none.

    Raises:
        CacheFormatError: If it is damaged.
    """
    file = path / MANIFEST_NAME
    return parse_manifest(file.read_bytes(), str(file)) if file.exists() else None


def compact(path: Path, name: str, header: CacheHeader) -> None:
    """Turn a full journal into a published shard; the commit record comes last.

    Memory: the journal's traces (about 10 bytes per kept entry) and the shard's bytes.
    """
    finished = list(read_journal(path / JOURNAL_FOLDER / f"{name}.journal", header.fingerprint))
    shard = encode_shard([item.trace for item in finished], header)
    commit = ShardCommit(
        name=name,
        header_fingerprint=header.fingerprint,
        size_bytes=len(shard.data),
        sha256=hashlib.sha256(shard.data).hexdigest(),
        num_entries=sum(item.trace.num_entries for item in finished),
        num_clamped_tails=sum(item.num_clamped_tails for item in finished),
        num_clamped_logits=sum(item.num_clamped_logits for item in finished),
        blocks=shard.blocks,
        traces=tuple(_trace_info(item) for item in finished),
    )
    publish(path / SHARD_FOLDER / f"{name}.arrow", shard.data)
    publish(path / SHARD_FOLDER / f"{name}.json", commit.to_bytes())
    _remove_journal(path, name)


def _trace_info(item: FinishedTrace) -> TraceInfo:
    trace = item.trace
    return TraceInfo(
        trace_id=trace.trace_id,
        n_total=trace.n_total,
        cot_start=trace.cot_start,
        answer_start=trace.answer_start,
        finish_reason=trace.finish_reason,
        source_hash=item.source_hash,
        fields=dict(trace.fields),
    )


def _remove_journal(path: Path, name: str) -> None:
    (path / JOURNAL_FOLDER / f"{name}.journal").unlink()
    fsync_folder(path / JOURNAL_FOLDER)


def _journalled(path: Path, name: str, header: CacheHeader) -> dict[str, str]:
    journal = path / JOURNAL_FOLDER / f"{name}.journal"
    return {
        item.trace.trace_id: item.source_hash for item in read_journal(journal, header.fingerprint)
    }


def read_commits(path: Path, header: CacheHeader) -> list[ShardCommit]:
    """Every commit record of a cache on a local disk, by name.

    Raises:
        CacheFormatError: If one is damaged.
        CacheMismatchError: If one belongs to another capture.
    """
    commits = []
    for file in sorted((path / SHARD_FOLDER).glob("*.json")):
        commit = parse_commit(file.read_bytes(), file.stem)
        check_commit(commit, header)
        commits.append(commit)
    return commits


def seal_cache(path: Path) -> Manifest:
    """Declare a cache complete: compact what journals are left and list its shards.

    No writer may be at work. Sealing a sealed cache changes nothing.

    Raises:
        CacheMismatchError: If a worker is still writing, or shards came after the seal.
        CacheError: If a commit record is damaged or of another capture.
    """
    manifest = read_manifest(path)
    if manifest is None:
        raise CacheFormatError(f"{path}: no cache here (expected a file {MANIFEST_NAME})")
    if manifest.seal is not None:
        later = {c.name for c in read_commits(path, manifest.header)} - dict(
            manifest.seal.shards
        ).keys()
        if later:
            raise CacheMismatchError(
                f"{path}: shard {min(later)} came after the seal and does not count; "
                "move the shards that came later into a cache of their own"
            )
        return manifest
    for worker in _workers(path):
        CacheWriter(path, manifest.header, worker=worker).finish()
    seal = make_seal(read_commits(path, manifest.header), manifest.header)
    sealed = Manifest(manifest.header, manifest.config, seal)
    publish(path / MANIFEST_NAME, sealed.to_bytes())
    return sealed


def _workers(path: Path) -> Iterable[str]:
    """Everybody who ever wrote here."""
    return sorted(file.stem for file in (path / JOURNAL_FOLDER).glob("*.lock"))
