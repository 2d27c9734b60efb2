"""`cache-teacher export`: a cache as JSONL, in the shape that `score` reads, or as Parquet."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from teacher_cache.format import Cache, Trace, stored_logprobs
from teacher_cache.tokenizer import TeacherTokenizer


def export_traces(cache: Cache, out: Path, tokenizer: TeacherTokenizer | None) -> int:
    """Write every trace once, without its distributions; returns how many.

    Args:
        cache: An open cache.
        out: The JSONL file; written beside and renamed, so that it is whole or absent.
        tokenizer: Adds the trace's text as `text`.
    """
    temporary = out.with_name(f".tmp-{out.name}")
    num_traces = 0
    with temporary.open("w") as file:
        for trace in _traces(cache):
            file.write(json.dumps(_row(trace, tokenizer)) + "\n")
            num_traces += 1
    temporary.replace(out)
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


def export_parquet(cache: Cache, out: Path) -> int:
    """Write one plain row per token, distributions included; returns how many traces.

    Columns: `trace_id`, `position`, `section` (prompt, cot, answer), `token_id`, `top_ids` and
    `top_logprobs` (nats, most probable first; null where the token has no distribution) and
    `tail_mass` (the probability outside them; null there too). Each trace is a row group.

    Args:
        cache: An open cache.
        out: The Parquet file; written beside and renamed, so that it is whole or absent.
    """
    temporary = out.with_name(f".tmp-{out.name}")
    num_traces = 0
    with pq.ParquetWriter(temporary, PARQUET_SCHEMA, compression="zstd") as writer:
        for trace in _traces(cache):
            writer.write_batch(_token_rows(trace))
            num_traces += 1
    temporary.replace(out)
    return num_traces


def _token_rows(trace: Trace) -> pa.RecordBatch:
    positions = np.arange(len(trace.token_ids), dtype=np.int32)
    bounds = np.array([trace.cot_start, trace.answer_start])
    section = np.searchsorted(bounds, positions, side="right")
    ends = pa.array(np.concatenate([[0], np.cumsum(trace.k, dtype=np.int32)]), pa.int32())
    absent = pa.array(trace.k == 0)
    logprobs = stored_logprobs(trace.k, trace.top_logits, trace.tail_logit).astype(np.float32)
    tail = 1 / (1 + np.exp(-trace.tail_logit.astype(np.float64)))
    columns = {
        "trace_id": pa.array([trace.trace_id] * len(positions)),
        "position": positions,
        "section": pa.array(np.array(["prompt", "cot", "answer"])[section]),
        "token_id": trace.token_ids,
        "top_ids": pa.ListArray.from_arrays(ends, pa.array(trace.top_ids), mask=absent),
        "top_logprobs": pa.ListArray.from_arrays(ends, pa.array(logprobs), mask=absent),
        "tail_mass": pa.array(tail.astype(np.float32), mask=trace.k == 0),
    }
    return pa.record_batch(columns, schema=PARQUET_SCHEMA)


def _traces(cache: Cache) -> Iterator[Trace]:
    rows_of: dict[int, dict[int, int]] = {}
    for shard, row in cache.traces:
        rows_of.setdefault(shard, {})[row] = cache.num_held(cache.shards[shard].traces[row])
    for shard, keep in rows_of.items():
        yield from cache.read(shard, keep).values()


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
