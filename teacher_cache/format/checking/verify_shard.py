"""Full check of one shard: bytes against the commit record, values against the format."""

import hashlib
import json
import zlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from teacher_cache.format.codec import is_clamped_tail, tail_logit_of
from teacher_cache.format.commit import ShardCommit
from teacher_cache.format.errors import CacheFormatError
from teacher_cache.format.header import UNUSABLE_JSON, CacheHeader, content_hash
from teacher_cache.format.reading.decode import MAGIC_BYTES, assemble, decode_bands
from teacher_cache.format.schema import METADATA_KEY
from teacher_cache.format.trace import Trace

_SUM_TOLERANCE = 1e-9
# Stored tails are bfloat16 logits: up to 0.03 nat off at a mass of 0.999, 0.06 at most.
_TAIL_SLACK = 1.07
_TAIL_FLOOR_LOGIT = float(tail_logit_of(np.ones(1))[0])


def broken_shard(
    data: bytes, commit: ShardCommit, header: CacheHeader | None, where: str
) -> Iterator[str]:
    """Yield everything that is wrong with a shard.

    A shard whose bytes do not match its record is not decoded: its contents cannot be trusted.
    If a band cannot be decoded, that is the last finding.

    Args:
        data: The whole file.
        commit: Its commit record.
        header: Header of the cache; None checks only the bytes.
        where: Name of the shard, for messages.
    """
    damage = list(_damage(data, commit))
    yield from damage
    if not damage and header is not None:
        try:
            yield from _broken_content(pa.py_buffer(data), commit, header, where)
        except CacheFormatError as error:
            yield str(error).removeprefix(f"{where}: ")


def header_in_shard(data: pa.Buffer | bytes, commit: ShardCommit) -> CacheHeader:
    """The cache's header as stored in a shard's schema.

    Raises:
        CacheFormatError: If it differs from the committed one.
    """
    where = f"{commit.name}.arrow"
    try:
        with pa.ipc.open_stream(pa.py_buffer(data).slice(MAGIC_BYTES)) as stream:
            about = json.loads(stream.schema.metadata[METADATA_KEY])
        found = about["header"]
    except (pa.ArrowException, OSError, *UNUSABLE_JSON) as error:
        raise CacheFormatError(f"{where}: no header in its schema: {error!r}") from error
    if content_hash(found) != commit.header_fingerprint:
        raise CacheFormatError(
            f"{where}: the header in its schema, {content_hash(found)}, is not the commit "
            f"record's, {commit.header_fingerprint}"
        )
    return CacheHeader.from_json(found, where)


def _damage(data: bytes, commit: ShardCommit) -> Iterator[str]:
    if len(data) != commit.size_bytes:
        yield f"has {len(data):,} bytes, expected {commit.size_bytes:,}"
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != commit.sha256:
        yield f"sha256 {sha256[:16]}..., expected {commit.sha256[:16]}..."
    view = memoryview(data)
    for band, block in enumerate(commit.blocks):
        end = block.offset + block.length
        crc32 = zlib.crc32(view[block.offset : end])
        if crc32 != block.crc32:
            yield (
                f"band {band} (bytes {block.offset:,} to {end:,}) is damaged: crc32 {crc32:08x}, "
                f"expected {block.crc32:08x}"
            )


def _broken_content(
    data: pa.Buffer, commit: ShardCommit, header: CacheHeader, where: str
) -> Iterator[str]:
    header_in_shard(data, commit)
    bands = decode_bands(data, commit, len(commit.blocks), header, where)
    with pa.ipc.open_file(data) as footer:
        if footer.num_record_batches != len(commit.blocks):
            yield f"its footer lists {footer.num_record_batches} bands, not {len(commit.blocks)}"
    num_entries = num_tails = num_logits = 0
    is_whole = True
    lowest = bands[0].top_logits.dictionary.min(initial=0)
    for row, info in enumerate(commit.traces):
        try:
            trace = assemble(commit, row, header.num_held(info.n_total, info.n_held), bands, where)
            trace.validate()
        except (CacheFormatError, ValueError) as error:
            yield str(error).removeprefix(f"{where}: ")
            is_whole = False
            continue
        for problem in broken_promises(trace, header):
            yield f"trace {info.trace_id!r}: {problem}"
        num_entries += trace.num_entries
        num_tails += int(is_clamped_tail(trace.tail_logit)[trace.k > 0].sum())
        num_logits += int((trace.top_logits == lowest).sum())
    if not is_whole:
        return  # the counts cannot agree
    if num_entries != commit.num_entries:
        yield f"has {num_entries:,} entries, the commit record says {commit.num_entries:,}"
    # Clamped values lie at the end of their range, beside values rounded to it.
    for name, counted in (("num_clamped_tails", num_tails), ("num_clamped_logits", num_logits)):
        if getattr(commit, name) > counted:
            yield f"the commit record says {name} {getattr(commit, name):,}, at most {counted:,}"


def broken_promises(trace: Trace, header: CacheHeader) -> Iterator[str]:
    """Check the cache policy's guarantees for every token, beyond `Trace.validate`."""
    has_entries = trace.k > 0
    tail, probs = trace.tail, np.exp(trace.top_logprobs)
    mass = np.bincount(trace.token_of_entry, weights=probs, minlength=len(trace)) + tail
    outside = (1 - header.mass) * _TAIL_SLACK + 1e-6
    # A row carried over from another tokenizer, or from another program, has what its source had.
    needs_mass = header.derived is None and header.imported is None
    checks = (
        ("has more entries than top_k plus the token itself", trace.k > header.top_k + 1),
        (
            "has fewer entries than its mass needs",
            needs_mass & (trace.k < header.top_k) & (tail > outside),
        ),
        ("has a tail below the floor", trace.tail_logit < _TAIL_FLOOR_LOGIT),
        ("has probabilities that do not add up to one", np.abs(mass - 1) > _SUM_TOLERANCE),
    )
    for text, is_broken in checks:
        tokens = np.flatnonzero(is_broken & has_entries)
        if len(tokens):
            yield f"token {tokens[0]} {text} ({len(tokens):,} tokens like it)"
    tokens = np.flatnonzero((trace.tail_logit != 0) & ~has_entries)
    if len(tokens):
        yield f"token {tokens[0]} has a tail but no entries"
