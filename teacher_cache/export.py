"""`cache-teacher export`: the traces of a cache as JSONL, in the shape that `score` reads."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from teacher_cache.format import Cache, Trace
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


def _traces(cache: Cache) -> Iterator[Trace]:
    rows_of: dict[int, dict[int, int]] = {}
    for shard, row in cache.traces:
        rows_of.setdefault(shard, {})[row] = cache.shards[shard].traces[row].n_total
    for shard, keep in rows_of.items():
        yield from cache.read(shard, keep).values()


def _row(trace: Trace, tokenizer: TeacherTokenizer | None) -> dict[str, Any]:
    ids = trace.token_ids.tolist()
    text = {} if tokenizer is None else {"text": tokenizer.decode(ids)}
    return {
        **trace.fields,
        "id": trace.trace_id,
        "token_ids": ids,
        "cot_start": trace.cot_start,
        "answer_start": trace.answer_start,
        **text,
    }
