"""`cache-teacher export`: a cache or part of it as JSONL, which `score` reads, or as Parquet."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from teacher_cache.format import (
    SECTIONS,
    Cache,
    CachePath,
    Trace,
    TraceInfo,
    lead_span_length,
    open_cache,
    rows_by_shard,
)
from teacher_cache.format.files import publish_file
from teacher_cache.format.reading.places import Place
from teacher_cache.sources.tokenizer import TeacherTokenizer, load_tokenizer
from teacher_cache.terminal.option import check_options, option
from teacher_cache.transform.export_axolotl import write_axolotl_rows

OnTrace = Callable[[int, int], None]  # traces done, and in all


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """`cache-teacher export`."""

    cache: CachePath = option("Folder or URI of the cache.", is_argument=True)
    out: Path = option(
        "File to write: Parquet if its name ends in .parquet, else JSONL.", is_argument=True
    )
    limit: int | None = option(
        "Export only this many traces, from the first.", default=None, at_least=1, unset="all"
    )
    trace: tuple[str, ...] = option(
        "Id of a trace to export; repeatable.",
        default=(),
        is_repeatable=True,
        can_be_empty=True,
        unset="all",
    )
    lead_span: float | None = option(
        "Proportion of every trace to export, from its start.",
        default=None,
        above=0,
        at_most=1,
        unset="all that the cache holds",
    )
    text: bool = option("Add each trace's text; for JSONL.", default=False)
    model: str | None = option(
        "Folder or hub id of the teacher, whose tokenizer turns ids into text.",
        default=None,
        unset="where it was at the capture",
    )
    logprobs: bool = option("Add each token's logprobs; for JSONL.", default=False)
    parquet: bool = option(
        "Write Parquet, one row per token with its logprobs, whatever the file is called.",
        default=False,
    )
    axolotl: bool = option(
        "Write Parquet with the rows of Axolotl's kd trainer, one per trace, whatever the file is "
        "called.",
        default=False,
    )
    force: bool = option("Overwrite the file if it exists.", default=False)
    allow_unsealed: bool = option(
        "Export the committed part of an incomplete cache.", default=False
    )

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("parquet", "axolotl"):
            if getattr(self, name) and self.out.suffix in (".jsonl", ".json", ".ndjson"):
                raise ValueError(f"--{name}: {self.out.name} is the name of a JSONL file")
        if self.parquet and self.axolotl:
            raise ValueError("--parquet and --axolotl: expected one of them")
        if self.is_parquet and (self.text or self.logprobs):
            raise ValueError(
                "--text and --logprobs add to JSONL; leave them out with Parquet, which has the "
                "logprobs anyway"
            )

    @property
    def is_parquet(self) -> bool:
        """Whether the file is Parquet: its name decides, unless an option does."""
        return self.parquet or self.axolotl or self.out.suffix in (".parquet", ".pq")


def export(config: ExportConfig, on_trace: OnTrace = lambda done, total: None) -> int:
    """Write every trace once; returns how many.

    The file is written under a temporary name and renamed, so that it is complete or absent.

    Args:
        config: What to write, and where.
        on_trace: Called after every trace, with their number so far and in all.

    Raises:
        CacheError: If the cache cannot be read, or lacks a named trace or part of the lead
            span.
        EngineError: If the teacher's tokenizer is needed and cannot be loaded.
    """
    cache = open_cache(config.cache, allow_unsealed=config.allow_unsealed)
    if config.axolotl:
        places = _places(cache, config)
        traces = _traces(cache, config, places)
        return write_axolotl_rows(traces, config.out, lambda done: on_trace(done, len(places)))
    if config.is_parquet:
        return _export_parquet(cache, config, on_trace)
    tokenizer = load_tokenizer(cache.header, config.model) if config.text else None
    return _export_jsonl(cache, tokenizer, config, on_trace)


def _export_jsonl(
    cache: Cache, tokenizer: TeacherTokenizer | None, config: ExportConfig, on_trace: OnTrace
) -> int:
    """With logprobs: `top_ids`, `top_logprobs` and `tail_mass`, lists with one item per token."""
    places, num_traces = _places(cache, config), 0
    with publish_file(config.out) as temporary, temporary.open("w") as file:
        for trace in _traces(cache, config, places):
            row = _row(trace, tokenizer)
            if config.logprobs:
                row |= _distributions(trace, has_tails=cache.header.has_tails)
            file.write(json.dumps(row) + "\n")
            num_traces += 1
            on_trace(num_traces, len(places))
    return num_traces


PARQUET_SCHEMA = pa.schema({
    "trace_id": pa.string(),
    "position": pa.int32(),
    "section": pa.string(),
    "token_id": pa.int32(),
    "top_ids": pa.list_(pa.int32()),
    "top_logprobs": pa.list_(pa.float32()),
    "tail_mass": pa.float32(),
})  # fmt: skip


def _export_parquet(cache: Cache, config: ExportConfig, on_trace: OnTrace) -> int:
    """Write one plain row per token, distributions included.

    Columns: `trace_id`, `position`, `section` (prompt, cot, answer), `token_id`, `top_ids` and
    `top_logprobs` (nats, most probable first; null if the token has no distribution) and
    `tail_mass` (the probability outside them; null likewise, and if it is not known). Each trace
    is a row group.
    """
    import pyarrow.parquet as pq  # 30 ms that other commands should not pay

    places, num_traces = _places(cache, config), 0
    with (
        publish_file(config.out) as temporary,
        pq.ParquetWriter(temporary, PARQUET_SCHEMA, compression="zstd") as writer,
    ):
        for trace in _traces(cache, config, places):
            writer.write_batch(_token_rows(trace, has_tails=cache.header.has_tails))
            num_traces += 1
            on_trace(num_traces, len(places))
    return num_traces


def _token_rows(trace: Trace, *, has_tails: bool) -> pa.RecordBatch:
    positions = np.arange(len(trace), dtype=np.int32)
    ends = pa.array(trace.entry_offsets.astype(np.int32))
    absent = pa.array(trace.k == 0)
    logprobs = trace.top_logprobs.astype(np.float32)
    columns = {
        "trace_id": pa.array([trace.trace_id] * len(positions)),
        "position": positions,
        "section": pa.array(np.array(SECTIONS)[trace.section_of_token]),
        "token_id": trace.token_ids,
        "top_ids": pa.ListArray.from_arrays(ends, pa.array(trace.top_ids), mask=absent),
        "top_logprobs": pa.ListArray.from_arrays(ends, pa.array(logprobs), mask=absent),
        "tail_mass": pa.array(trace.tail.astype(np.float32), mask=(trace.k == 0) | (not has_tails)),
    }
    return pa.record_batch(columns, schema=PARQUET_SCHEMA)


def _distributions(trace: Trace, *, has_tails: bool) -> dict[str, Any]:
    rows = _token_rows(trace, has_tails=has_tails)
    return {name: rows[name].to_pylist() for name in ("top_ids", "top_logprobs", "tail_mass")}


def _places(cache: Cache, config: ExportConfig) -> Sequence[Place]:
    named = {cache.place(trace_id) for trace_id in config.trace}
    return [place for place in cache.traces if place in named or not named][: config.limit]


def _traces(cache: Cache, config: ExportConfig, places: Sequence[Place]) -> Iterator[Trace]:
    for shard, rows in rows_by_shard(places).items():
        keep = {row: _num_exported(cache, cache.shards[shard].traces[row], config) for row in rows}
        yield from cache.read(shard, keep).values()


def _num_exported(cache: Cache, info: TraceInfo, config: ExportConfig) -> int:
    if config.lead_span is None:
        return cache.num_held(info)
    return lead_span_length(info.n_total, config.lead_span)


def _row(trace: Trace, tokenizer: TeacherTokenizer | None) -> dict[str, Any]:
    ids = trace.token_ids.tolist()
    text = {} if tokenizer is None else {"text": tokenizer.decode(ids)}
    return {
        **trace.fields,
        "id": trace.trace_id,
        "token_ids": ids,
        "cot_start": min(trace.cot_start, len(ids)),
        "answer_start": min(trace.answer_start, len(ids)),
        **text,
    }
