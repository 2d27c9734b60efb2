"""Every request of an input as a table, kept beside the cache while it is captured.

Rendering a million prompts takes many minutes, and a capture that is resumed has rendered them
before: as long as rows, settings, tokenizer and our own code are the same to the byte, the table
is used.
"""

import hashlib
import json
import logging
import re
import time
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa

from teacher_cache.capture.job import Job
from teacher_cache.format import CachePath, open_store
from teacher_cache.sources import PROMPT_LIKE_COLUMNS, Rejects
from teacher_cache.sources.row import Row

logger = logging.getLogger(__name__)

_SAY_EVERY_S = 10.0  # interval of messages while the input is read
_SCHEMA = pa.schema({
    "row": pa.int64(),  # of the input, from 0
    "trace_id": pa.string(),
    "request_id": pa.string(),
    "source_hash": pa.string(),
    "longest": pa.int32(),  # tokens that the engine must have room for
    "has_thought": pa.bool_(),
})  # fmt: skip
_PART_REQUESTS = 1 << 16
_NAME, _SUFFIX = "survey", "bin"
_KEY, _FACTS = b"leadspan.input", b"leadspan.facts"  # of the file's metadata
_NOT_OF_ROWS = (  # of the config
    "worker", "num_replicas", "ray_address", "journal", "limit", "out", "engine_arg",
)  # fmt: skip


@dataclass(frozen=True)
class SurveyTable:
    """Requests of an input, in its order: one row each, as in `_SCHEMA`."""

    table: pa.Table
    num_rows: int  # of the input
    rejects: Rejects
    passed_over: tuple[str, ...]  # columns that look like prompts but are the user's own fields


def survey_table(job: Job, *, may_resume: bool) -> SurveyTable:
    """The table of an input: that of an earlier start, or made by rendering every row.

    Args:
        job: Job with the input and the cache.
        may_resume: Whether the cache has traces already. Its header then holds the model to what
            it was; before, the model's files may have changed since the table was made.

    Raises:
        SourceError: If the input cannot be read, or has a bad row under `strict`.
    """
    store, name = open_store(job.out), job.file_name(_NAME, _SUFFIX)
    if may_resume and store.size(name) is not None:
        digest = _InputDigest(job)
        for row in job.source.input:
            digest.add(row)
        found = _parsed(store.read(name), digest)
        if found is not None:
            return found
    # In one pass: an input on the hub is fetched anew for each.
    digest = _InputDigest(job)
    found = _rendered(job, digest)
    if found.table.num_rows:  # else the capture will be refused, and shall leave nothing
        store.make_folder("")
        store.publish(name, _to_bytes(found, digest))
    return found


def remove_survey_tables(cache: CachePath) -> None:
    """Remove the tables of all workers from a cache that is complete."""
    store = open_store(cache)
    for name in store.sizes(""):
        if re.fullmatch(rf"{_NAME}(-.+)?\.{_SUFFIX}", name):
            store.remove(name)


class _InputDigest:
    """Digest of the code, the settings and all rows as they are."""

    def __init__(self, job: Job) -> None:
        self.num_rows = 0
        self._digest = hashlib.sha256(_code_digest())
        config = {name: value for name, value in job.config.items() if name not in _NOT_OF_ROWS}
        only = None if job.source.only_ids is None else sorted(job.source.only_ids)
        tokenizer = job.tokenizer
        meaning = [tokenizer.content_hash, tokenizer.terminal_ids, tokenizer.template.text]
        settings = [config, meaning, only]
        self._digest.update(json.dumps(settings, default=repr).encode())

    def add(self, row: Row) -> None:
        content = row.content
        data = content if isinstance(content, bytes) else json.dumps(content, default=repr).encode()
        self._digest.update(b"%d:%s" % (len(data), data))
        self.num_rows += 1

    @property
    def key(self) -> str:
        return self._digest.hexdigest()


@cache
def _code_digest() -> bytes:
    """Digest of what renders rows: another version may render them differently."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for file in sorted([*package.glob("sources/*.py"), *package.glob("capture/*.py")]):
        digest.update(file.read_bytes())
    for name in ("transformers", "tokenizers", "jinja2"):
        digest.update(version(name).encode())
    return digest.digest()


def _rendered(job: Job, digest: _InputDigest) -> SurveyTable:
    """Render every row once: a bad row found after two days of capture is found too late."""
    rejects = Rejects()
    parts: list[pa.RecordBatch] = []
    columns: list[list[object]] = [[] for _ in _SCHEMA]
    passed_over: tuple[str, ...] | None = None
    said_at_s = time.monotonic()

    def end_part() -> None:
        parts.append(pa.record_batch(columns, schema=_SCHEMA))
        for column in columns:
            column.clear()

    for number, trace in job.source.read_numbered(rejects, digest.add):
        if time.monotonic() - said_at_s >= _SAY_EVERY_S:
            said_at_s = time.monotonic()
            logger.info("reading %s: %d rows so far", job.source.path, number + 1)
        if passed_over is None:
            passed_over = tuple(name for name in PROMPT_LIKE_COLUMNS if name in trace.fields)
        has_thought = trace.bounds is None or trace.bounds[0] < trace.bounds[1]
        for request in job.requests(trace):
            longest = len(request.token_ids) + request.max_new_tokens
            values = (
                number, trace.trace_id, request.request_id, trace.source_hash, longest,
                has_thought,
            )  # fmt: skip
            for column, value in zip(columns, values, strict=True):
                column.append(value)
        if len(columns[0]) >= _PART_REQUESTS:
            end_part()
    end_part()
    table = pa.Table.from_batches(parts, _SCHEMA)
    return SurveyTable(table, digest.num_rows, rejects, passed_over or ())


def _to_bytes(found: SurveyTable, digest: _InputDigest) -> bytes:
    facts = {"rejects": found.rejects.to_json(), "passed_over": found.passed_over}
    metadata = {_KEY: digest.key, _FACTS: json.dumps(facts)}
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    table = found.table.replace_schema_metadata(metadata)
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return hashlib.sha256(data).digest() + data


def _parsed(data: bytes, digest: _InputDigest) -> SurveyTable | None:
    """The table of a file; None if it is damaged or of another input: it only saves time."""
    data, checksum = data[32:], data[:32]
    if hashlib.sha256(data).digest() != checksum:
        return None
    table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
    metadata = table.schema.metadata
    if metadata[_KEY].decode() != digest.key:
        return None
    facts = json.loads(metadata[_FACTS])
    rejects = Rejects.from_json(facts["rejects"])
    return SurveyTable(table, digest.num_rows, rejects, tuple(facts["passed_over"]))
