"""Turns a full journal into a published shard; the commit record comes last.

Memory: the journal's bytes (SHARD_BYTES and one trace), its traces decoded (at most about 2.5 times
MAX_DECODED_BYTES) and once more as the file has them (3 bytes per entry, 5 where a shard has more
than 65,536 ids), and the shard's bytes up to three times while they are built and read back.
Measured: 350 MiB for a full journal of 1.5 M tokens with 15 entries each, less for one that
MAX_DECODED_BYTES closes.
"""

import hashlib

from teacher_cache.format.commit import FileDigest, ShardCommit, TraceInfo
from teacher_cache.format.header import CacheHeader
from teacher_cache.format.records import (
    MESSAGES_FOLDER,
    commit_file,
    messages_file,
    shard_file,
)
from teacher_cache.format.store import Store
from teacher_cache.format.writing.journal import FinishedTrace, read_journal
from teacher_cache.format.writing.journal_places import Journals
from teacher_cache.format.writing.messages import encode_messages
from teacher_cache.format.writing.shard import encode_shard


def compact(journals: Journals, name: str, header: CacheHeader) -> None:
    """Publish a journal's traces as a shard, then remove the journal.

    Raises:
        CacheFormatError: If the journal belongs to another capture.
        OSError: If the shard cannot be published; the journal stays.
    """
    finished = list(read_journal(journals.file(name), header.fingerprint))
    if finished:
        _publish(finished, journals.store, _free_name(journals.store, name), header)
    journals.remove(name)


def shard_name(worker: str, generation: int) -> str:
    """Name of the shard made from a worker's n-th journal."""
    return f"{worker}-{generation:05d}"


def generation_of(name: str) -> int:
    """Inverse of `shard_name`, for any worker."""
    return int(name.rpartition("-")[2])


def _free_name(store: Store, name: str) -> str:
    """This name, or the next free one: another machine may have committed a shard under it."""
    while store.size(commit_file(name)) is not None:
        name = shard_name(name.rpartition("-")[0], generation_of(name) + 1)
    return name


def _publish(finished: list[FinishedTrace], store: Store, name: str, header: CacheHeader) -> None:
    shard = encode_shard([item.trace for item in finished], header)
    asked = encode_messages(finished)
    commit = ShardCommit(
        name=name,
        header_fingerprint=header.fingerprint,
        size_bytes=len(shard.data),
        sha256=hashlib.sha256(shard.data).hexdigest(),
        num_entries=sum(item.trace.num_entries for item in finished),
        num_clamped_tails=sum(item.num_clamped_tails for item in finished),
        num_clamped_logits=sum(item.num_clamped_logits for item in finished),
        blocks=shard.blocks,
        traces=tuple(_trace_info(item, header) for item in finished),
        messages=FileDigest(len(asked), hashlib.sha256(asked).hexdigest()) if asked else None,
    )
    if asked:
        store.make_folder(MESSAGES_FOLDER)
        store.publish(messages_file(name), asked)
    store.publish(shard_file(name), shard.data)
    store.publish(commit_file(name), commit.to_bytes())


def _trace_info(item: FinishedTrace, header: CacheHeader) -> TraceInfo:
    trace = item.trace
    return TraceInfo(
        trace_id=trace.trace_id,
        n_total=trace.n_total,
        cot_start=trace.cot_start,
        answer_start=trace.answer_start,
        finish_reason=trace.finish_reason,
        source_hash=item.source_hash,
        n_held=None if header.lead_spans is None else len(trace),
        fields=dict(trace.fields),
    )
