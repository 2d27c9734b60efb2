"""CacheWriter: finished traces -> journal -> shards -> seal. A kill at any moment loses no trace.

DIR/cache.json              header; sealed at the end
DIR/journal/w0-00002.journal    finished traces that do not fill a shard yet
DIR/shards/w0-00001.arrow   published, and trusted once its commit record exists:
DIR/shards/w0-00001.json
"""

import logging
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from teacher_cache.format.header import CacheHeader
from teacher_cache.format.manifest import MANIFEST_NAME, SHARD_FOLDER, Manifest
from teacher_cache.format.noise import NoiseFloor, publish_noise
from teacher_cache.format.records import (
    committed_names,
    read_commits,
    read_manifest,
    require_same_capture,
)
from teacher_cache.format.store import CachePath, open_store
from teacher_cache.format.trace import MAX_K
from teacher_cache.format.writing.compaction import compact, generation_of, shard_name
from teacher_cache.format.writing.journal import (
    FinishedTrace,
    Journal,
    journal_damage,
    read_journal,
)
from teacher_cache.format.writing.journal_places import open_journals

logger = logging.getLogger(__name__)

SHARD_BYTES = 32 << 20  # a dictionary of 150,000 ids is then 1.25 % of it, read with any band
MAX_DECODED_BYTES = 128 << 20  # in a journal, before compression: limits compaction's memory
_WORKER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_]*\Z")  # `-` ends it in a shard's name
# Most that a machine's (not a process's) crash may cost. A sync took 7 ms per trace of 16 kB
# (seven times the rest of the work), 8 ms after 1 MiB, 27 ms after 4 MiB, on a busy virtual disk.
SYNC_INTERVAL_S = 2.0
SYNC_BYTES = 4 << 20


class CacheWriter:
    """Writes one worker's traces; several workers may write into one folder at the same time."""

    def __init__(
        self,
        path: CachePath,
        header: CacheHeader,
        *,
        config: Mapping[str, Any] | None = None,
        worker: str = "w0",
        journal: Path | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Open a cache for writing: create it if it is missing, continue it otherwise.

        Args:
            path: The cache's folder, or a URI that pyarrow.fs knows.
            header: Facts that every writer of this cache must agree on.
            config: The capture's resolved configuration, kept in `cache.json` for the reader.
            worker: Name that no other process is using: letters, digits and `_`.
            journal: Local folder, for this cache alone, of traces that do not yet fill a shard. By
                default inside a local cache, and under the user's cache directory otherwise.
            shard_bytes: Size of the journal, about, at which its shard is closed.

        Raises:
            CacheMismatchError: If the folder holds another capture's cache, or another process
                writes as this worker.
            CacheFormatError: If the folder's own files are damaged.
            OSError: If it cannot be read or written.
        """
        if not _WORKER_NAME.match(worker):
            raise ValueError(f"worker: expected only letters, digits and _, got {worker!r}")
        self.header = header
        self._worker = worker
        self._shard_bytes = shard_bytes
        self._store = open_store(path)
        self.where = self._store.where
        for folder in ("", SHARD_FOLDER):
            self._store.make_folder(folder)
        self.manifest = self._open_manifest(config or {})
        self.require_header(header)
        self._journals = open_journals(path, self._store, journal)
        self._announced = False
        self._journal: Journal | None = None  # opened by the first trace
        self._compactor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compact")
        self._compaction: Future[None] | None = None
        self._lock = self._journals.lock(worker)
        try:
            names = committed_names(self._store)
            self._finished = {
                trace.trace_id: trace.source_hash
                for commit in read_commits(self._store, names, header)
                for trace in commit.traces
            }
            self._recover(names)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def require_header(self, header: CacheHeader) -> None:
        """Refuse to write into another capture's cache.

        Raises:
            CacheMismatchError: Names every fact in which the headers differ.
        """
        require_same_capture(self.where, header, self.manifest.header)

    def _open_manifest(self, config: Mapping[str, Any]) -> Manifest:
        manifest = read_manifest(self._store)
        if manifest is None:
            manifest = Manifest(self.header, config)
            self._store.publish(MANIFEST_NAME, manifest.to_bytes())
        return manifest

    def _recover(self, committed: Iterable[str]) -> None:
        """Resume this worker's journals where an earlier process left them."""
        self._store.remove_unpublished(SHARD_FOLDER, f"{self._worker}-")
        names = self._journals.names(self._worker)
        own = [name for name in committed if name.rpartition("-")[0] == self._worker]
        self._generation = max((generation_of(name) for name in (*names, *own)), default=-1)
        for name in names:
            self._say_damage(name)
            traces = {
                item.trace.trace_id: item.source_hash
                for item in read_journal(self._journals.file(name), self.header.fingerprint)
            }
            if traces.keys() <= self._finished.keys():
                self._journals.remove(name)  # interrupted between the commit record and this
                continue
            self._finished |= traces
            if name == names[-1]:
                self._open_journal(name, num_traces=len(traces))
            else:  # full, but not yet compacted
                compact(self._journals, name, self.header)

    def _say_damage(self, name: str) -> None:
        file = self._journals.file(name)
        for start, end in journal_damage(file, self.header.fingerprint):
            logger.warning(
                "%s: bytes %d to %d are torn or damaged; every whole trace is kept, what was "
                "there counts as missing",
                file, start, end,
            )  # fmt: skip

    def _next_journal(self) -> Journal:
        self._generation += 1
        return self._open_journal(shard_name(self._worker, self._generation), num_traces=0)

    def _open_journal(self, name: str, num_traces: int) -> Journal:
        if not self._announced:
            self._journals.announce(self._worker)
            self._announced = True
        self._journal = Journal(self._journals.file(name), self.header.fingerprint)
        self._name = name
        self._num_journalled = num_traces
        self._synced_at_s = time.monotonic()
        return self._journal

    @property
    def sealed(self) -> bool:
        """Whether the cache is complete, so that nothing can be added."""
        return self.manifest.seal is not None

    def finished(self) -> Mapping[str, str]:
        """trace_id -> source_hash of every trace already in the cache."""
        return self._finished

    def append(self, finished: FinishedTrace) -> None:
        """Keep one finished trace.

        Raises:
            ValueError: If the trace breaks an invariant or is already in the cache.
            OSError: If it cannot be written; all earlier traces are kept.
        """
        trace = finished.trace
        trace.validate()
        num_held = self.header.num_held(trace.n_total)  # of several lead spans, the longest
        if len(trace) > num_held or (len(trace) < num_held and self.header.lead_spans is None):
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
            raise ValueError(f"trace {trace.trace_id!r} is already in the cache")
        if self.sealed:
            raise ValueError(f"{self.where} is sealed; nothing can be added")
        journal = self._journal or self._next_journal()
        journal.append(finished)
        self._finished[trace.trace_id] = finished.source_hash
        self._num_journalled += 1
        if self._compaction is not None and self._compaction.done():
            self._wait_for_compaction()  # its error, if any, stops the capture here
        if journal.num_bytes >= self._shard_bytes or journal.num_decoded_bytes >= MAX_DECODED_BYTES:
            self._roll(journal)
        elif (
            journal.num_unsynced_bytes >= SYNC_BYTES
            or time.monotonic() - self._synced_at_s >= SYNC_INTERVAL_S
        ):
            journal.sync()
            self._synced_at_s = time.monotonic()

    def _roll(self, journal: Journal) -> None:
        """Hand the full journal to the compacting thread; the next trace starts another."""
        self._journal = None
        journal.close()
        self._wait_for_compaction()  # at most one journal waits: a slow disk slows the capture
        self._compaction = self._compactor.submit(compact, self._journals, self._name, self.header)

    def _wait_for_compaction(self) -> None:
        compaction, self._compaction = self._compaction, None
        if compaction is not None:
            compaction.result()  # an error in the thread is an error of the capture

    def close(self) -> None:
        """Stop writing; the journal is kept for this worker's next writer to continue."""
        try:
            journal, self._journal = self._journal, None
            if journal is not None:
                journal.close()
            self._wait_for_compaction()
        finally:
            self._compactor.shutdown()
            self._lock.close()

    def keep_noise(self, noise: NoiseFloor) -> None:
        """Keep this worker's noise floor; the seal carries those of all."""
        publish_noise(self._store, self._worker, noise)

    def finish(self) -> None:
        """Compact the rest of the journal, so that readers see every trace; then close."""
        with self:
            if self._journal is not None and self._num_journalled:
                self._roll(self._journal)
            elif self._journal is not None:
                self._journals.remove(self._name)
            self._wait_for_compaction()
            self._journals.withdraw(self._worker)
