"""Commit records: contents and checksums of a shard; a shard without one does not count.

A capture that is resumed reads the records of all its traces, which may be a million: what is done
per trace here is kept to a few microseconds.
"""

import hashlib
import json
import re
import reprlib
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format.bands import band_starts, lead_span_lengths
from teacher_cache.format.errors import CacheFormatError, CacheMismatchError
from teacher_cache.format.header import (
    FORMAT_VERSION,
    UNUSABLE_JSON,
    CacheHeader,
    canonical_json,
    content_hash,
)

_T = TypeVar("_T")
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\Z")


@dataclass(frozen=True)
class TraceInfo:
    """Facts about a trace that are known without reading its shard."""

    trace_id: str
    n_total: int
    cot_start: int
    answer_start: int
    finish_reason: str
    source_hash: str  # hash of its input: a changed input is noticed on resume
    fields: Mapping[str, Any] = field(default_factory=dict)
    n_held: int | None = None  # tokens that a cache of several lead spans holds of it


@dataclass(frozen=True)
class Block:
    """A contiguous run of a shard's bytes with one checksum: band `b` is block `b`.

    Block 0 begins at byte 0 and so holds the schema and the dictionaries too.
    """

    offset: int
    length: int
    crc32: int
    num_rows: int
    num_tokens: int


@dataclass(frozen=True)
class FileDigest:
    """Size and hash of a further file of the cache."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardCommit:
    """The commit record of one shard, `<name>.json` beside `<name>.arrow`."""

    name: str
    header_fingerprint: str
    size_bytes: int
    sha256: str
    num_entries: int  # kept entries of all tokens
    num_clamped_tails: int
    num_clamped_logits: int
    blocks: tuple[Block, ...]
    traces: tuple[TraceInfo, ...]
    messages: FileDigest | None = None  # of messages/<name>.arrow, if prompts were messages
    checksum: str = ""  # the record's own, set when it is read; the seal lists it

    @property
    def num_tokens(self) -> int:
        """Tokens that the cache holds of all traces."""
        return sum(block.num_tokens for block in self.blocks)

    def prefix_bytes(self, num_bands: int) -> int:
        """Bytes from the start of the file to the end of its first `num_bands` bands."""
        if num_bands == 0:
            return 0
        last = self.blocks[num_bands - 1]
        return last.offset + last.length

    @property
    def content(self) -> str:
        """Hash of all that this version knows of the record."""
        return content_hash(self._record())

    def to_bytes(self) -> bytes:
        """The file's content: the record and its checksum, in the text that is hashed."""
        record = self._record()
        return canonical_json({**record, "checksum": content_hash(record)}) + b"\n"

    def _record(self) -> dict[str, Any]:
        record = {"format_version": FORMAT_VERSION, **asdict(self)}
        del record["checksum"]
        if self.messages is None:
            del record["messages"]
        for trace in record["traces"]:
            if trace["n_held"] is None:
                del trace["n_held"]
        return record


_KEYS: Mapping[type, frozenset[str]] = {
    kind: frozenset(item.name for item in dataclass_fields(kind))
    for kind in (TraceInfo, Block, FileDigest, ShardCommit)
}


def parse_commit(text: bytes, name: str, advice: str = "") -> ShardCommit:
    """Read a commit record.

    Args:
        text: The file's bytes.
        name: The shard's name: the file's name without `.json`.
        advice: Text that says what to do if the record is damaged.

    Raises:
        CacheFormatError: If the record is damaged, or is stored under another shard's name.
    """
    where = f"{name}.json"
    try:
        record = json.loads(text.decode())  # of bytes, it would take UTF-16 too
        checksum = record.pop("checksum")
        if not _is_hashed_text(text, checksum) and content_hash(record) != checksum:
            raise CacheFormatError(f"{where}: the commit record's checksum does not match{advice}")
        version = record.pop("format_version")
        if version != FORMAT_VERSION:
            raise CacheFormatError(
                f"{where}: format version {version}; this leadspan reads {FORMAT_VERSION}"
            )
        record["blocks"] = tuple(_known(Block, block) for block in record["blocks"])
        record["traces"] = tuple(map(_trace_info, record["traces"]))
        if record.get("messages") is not None:
            record["messages"] = _known(FileDigest, record["messages"])
        commit = _known(ShardCommit, {**record, "checksum": checksum})
        _check_types(commit, where)
        check_layout(commit, name, where)
    except UNUSABLE_JSON as error:
        raise CacheFormatError(f"{where}: not a commit record: {error!r}{advice}") from error
    return commit


def _is_hashed_text(text: bytes, checksum: str) -> bool:
    """Whether a record's text but for its checksum is what was hashed, as in this writer's.

    Making that text of a parsed record takes longer than parsing it.
    """
    before, found, after = text.partition(b'"checksum":"%s",' % checksum.encode())
    hashed = before + after.removesuffix(b"\n")
    return bool(found) and hashlib.sha256(hashed).hexdigest()[:32] == checksum


def _trace_info(values: dict[str, Any]) -> TraceInfo:
    if {*values, "n_held"} != _KEYS[TraceInfo]:
        return _known(TraceInfo, values)
    info = object.__new__(TraceInfo)  # the constructor, of a frozen class, takes six times as long
    info.__dict__.update({"n_held": None, **values})
    return info


def _known(kind: type[_T], values: Mapping[str, Any]) -> _T:
    """Build a dataclass from a JSON object; keys that this version does not know are ignored."""
    names = _KEYS[kind]
    return kind(**{name: value for name, value in values.items() if name in names})


def _check_types(commit: ShardCommit, where: str) -> None:
    """Check a record's values: a file from elsewhere may hold any JSON."""
    counts = [commit.size_bytes, commit.num_entries]
    counts += [commit.num_clamped_tails, commit.num_clamped_logits]
    for block in commit.blocks:
        counts += [block.offset, block.length, block.crc32, block.num_rows, block.num_tokens]
    texts = [commit.name, commit.header_fingerprint, commit.sha256]
    if commit.messages is not None:
        counts += [commit.messages.size_bytes]
        texts += [commit.messages.sha256]
    for trace in commit.traces:
        counts += [trace.n_total, trace.cot_start, trace.answer_start]
        counts += [] if trace.n_held is None else [trace.n_held]
        texts += [trace.trace_id, trace.finish_reason, trace.source_hash]
        if not isinstance(trace.fields, dict):
            raise CacheFormatError(f"{where}: the fields of a trace must be a JSON object")
    for count in counts:
        if type(count) is not int or not 0 <= count < 1 << 62:
            raise CacheFormatError(f"{where}: expected a count, got {reprlib.repr(count)}")
    for text in texts:
        if not isinstance(text, str):
            raise CacheFormatError(f"{where}: expected a string, got {reprlib.repr(text)}")
    for trace in commit.traces:
        if not 0 <= trace.cot_start <= trace.answer_start <= trace.n_total:
            raise CacheFormatError(
                f"{where}: the bounds of trace {trace.trace_id!r} are out of order"
            )
        if not 1 <= trace.n_total < 1 << 31:
            raise CacheFormatError(f"{where}: trace {trace.trace_id!r} has {trace.n_total} tokens")


def check_commit(commit: ShardCommit, header: CacheHeader) -> None:
    """Check a record against the header of the cache that it is in.

    Raises:
        CacheMismatchError: If the shard belongs to another capture.
        CacheFormatError: If its bands do not match its traces.
    """
    where = f"shard {commit.name}"
    if commit.header_fingerprint != header.fingerprint:
        raise CacheMismatchError(
            f"{where}: expected a shard of capture {header.fingerprint}, got one of "
            f"{commit.header_fingerprint}; move it out of the folder"
        )
    if len(commit.blocks) != header.num_bands:
        raise CacheFormatError(
            f"{where}: expected {header.num_bands} bands, got {len(commit.blocks)}"
        )
    for trace in commit.traces:
        if (trace.n_held is None) != (header.lead_spans is None):
            raise CacheFormatError(
                f"{where}: expected n_held of a trace if, and only if, the cache has several lead "
                f"spans; trace {trace.trace_id!r} breaks this"
            )
        if trace.n_held is not None and not 1 <= trace.n_held <= trace.n_total:
            raise CacheFormatError(
                f"{where}: trace {trace.trace_id!r} has {trace.n_total} tokens and holds "
                f"{trace.n_held}"
            )
    num_tokens = _num_tokens_of_bands(commit, header)
    for band, block in enumerate(commit.blocks):
        if block.num_tokens != num_tokens[band]:
            raise CacheFormatError(
                f"{where}: band {band} has {block.num_tokens} tokens, its traces {num_tokens[band]}"
            )


def _num_tokens_of_bands(commit: ShardCommit, header: CacheHeader) -> NDArray[np.int64]:
    """[S] Tokens that each band of a shard holds by the lengths of its traces."""
    if header.lead_spans is None:
        n_total = np.array([trace.n_total for trace in commit.traces], np.int64)
        num_held = lead_span_lengths(n_total, header.max_lead_span)
    else:
        num_held = np.array([trace.n_held for trace in commit.traces], np.int64)
    ends: NDArray[np.int64] = band_starts(num_held, header.num_bands).sum(axis=1)
    return np.diff(ends)


def check_layout(commit: ShardCommit, name: str, where: str) -> None:
    """Check that a record has its shard's name, blocks without gaps, and each trace once.

    Raises:
        CacheFormatError: If it has not.
    """
    if commit.name != name or not PLAIN_NAME.match(name):
        raise CacheFormatError(f"{where}: expected the record of {name!r}, got {commit.name!r}")
    if not commit.traces:
        raise CacheFormatError(f"{where}: expected at least one trace")
    position = 0
    for block in commit.blocks:
        if block.offset != position or block.length <= 0:
            raise CacheFormatError(
                f"{where}: expected a block at byte {position}, got {block.length} bytes "
                f"at {block.offset}"
            )
        if block.num_rows != len(commit.traces):
            raise CacheFormatError(
                f"{where}: expected {len(commit.traces)} rows per band, got {block.num_rows}"
            )
        position += block.length
    if not commit.blocks or position > commit.size_bytes:
        raise CacheFormatError(f"{where}: blocks end at {position} of {commit.size_bytes} bytes")
    if len({trace.trace_id for trace in commit.traces}) != len(commit.traces):
        raise CacheFormatError(f"{where}: a trace occurs twice in the shard")


def block_of(data: bytes | memoryview, offset: int, num_rows: int, num_tokens: int) -> Block:
    """The Block that describes `data` at `offset`."""
    return Block(offset, len(data), zlib.crc32(data), num_rows, num_tokens)
