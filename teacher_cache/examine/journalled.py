"""Finished traces of a capture at work that are in no shard yet."""

from dataclasses import dataclass
from pathlib import Path

from teacher_cache.format import Cache
from teacher_cache.format.manifest import JOURNAL_FOLDER
from teacher_cache.format.writing.journal import read_journal


@dataclass(frozen=True)
class Journalled:
    """What stands in the journals of a cache's workers."""

    num_workers: int
    num_traces: int
    num_tokens: int


def journalled(cache: Cache) -> Journalled | None:
    """Count the traces in a cache's own journals, without touching them.

    Returns:
        None where the cache is remote: its journals are where the workers are.

    Raises:
        CacheFormatError: If a journal belongs to another capture, or a whole frame is no trace.
    """
    if cache.store.folder is None:
        return None
    committed = {name for name, _ in cache.catalog.shard_list}
    num_workers = num_traces = num_tokens = 0
    for path in sorted((Path(cache.store.root) / JOURNAL_FOLDER).glob("*.journal")):
        if path.stem in committed:
            continue  # its shard counts
        num_before = num_traces
        try:
            for finished in read_journal(path, cache.header.fingerprint):
                num_traces += 1
                num_tokens += len(finished.trace)
        except FileNotFoundError:
            continue  # a running writer has since turned it into a shard
        num_workers += num_traces > num_before
    return Journalled(num_workers, num_traces, num_tokens)
