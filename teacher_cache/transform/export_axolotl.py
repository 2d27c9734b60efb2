"""Rows that Axolotl's `kd` trainer takes without preparing them: what `axolotl preprocess` writes.

Its collator pads rows of fewer candidates, so that an adaptive k is kept.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from teacher_cache.format import Trace
from teacher_cache.format.files import publish_file

_NO_LABEL = -100  # of a token that is not trained on
SCHEMA = pa.schema({
    "id": pa.string(),
    "input_ids": pa.list_(pa.int32()),
    "attention_mask": pa.list_(pa.int8()),
    "labels": pa.list_(pa.int32()),
    "target_token_ids": pa.list_(pa.list_(pa.int32())),
    "target_logprobs": pa.list_(pa.list_(pa.float32())),
    "target_mask": pa.list_(pa.list_(pa.int8())),
})  # fmt: skip


def write_axolotl_rows(traces: Iterable[Trace], file: Path, on_trace: Callable[[int], None]) -> int:
    """Write one row per trace, as Parquet; returns how many, and tells `on_trace` on the way.

    Row t is the distribution over token t + 1: its loss compares it with the hidden state of token
    t, and shifts nothing but the labels. As in Axolotl's own files, it is divided by the sum of the
    kept entries: the tail is not in it. Tokens of the prompt have the label -100, and rows over
    them a mask of 0; rows without a distribution have one entry that the mask takes out.
    """
    import pyarrow.parquet as pq  # 30 ms that other commands should not pay

    num_traces = 0
    with (
        publish_file(file) as temporary,
        pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer,
    ):
        for trace in traces:
            writer.write_batch(_row(trace))
            num_traces += 1
            on_trace(num_traces)
    return num_traces


def _row(trace: Trace) -> pa.RecordBatch:
    num_tokens = len(trace)
    is_prompt = np.arange(num_tokens) < trace.cot_start
    of_next = np.append(trace.k[1:], 0).astype(np.int64)  # token 0 has no distribution
    k = np.maximum(of_next, 1)  # a row cannot be empty
    offsets = np.concatenate([[0], np.cumsum(k)]).astype(np.int32)
    is_kept = np.repeat(of_next > 0, k)
    ids = np.zeros(len(is_kept), np.int32)
    logprobs = np.full(len(is_kept), -1e9, np.float32)  # what its collator pads with
    ids[is_kept] = trace.top_ids
    inside = np.log1p(-trace.tail[trace.token_of_entry])
    logprobs[is_kept] = trace.top_logprobs - inside
    mask = is_kept & ~np.repeat(np.append(is_prompt[1:], False), k)
    lists = {
        "target_token_ids": pa.array(ids),
        "target_logprobs": pa.array(logprobs),
        "target_mask": pa.array(mask.astype(np.int8)),
    }
    nested = {
        name: pa.array([pa.ListArray.from_arrays(pa.array(offsets), flat).to_pylist()], type_)
        for (name, flat), type_ in zip(
            lists.items(), [SCHEMA.field(name).type for name in lists], strict=True
        )
    }
    plain = {
        "id": pa.array([trace.trace_id]),
        "input_ids": pa.array([trace.token_ids.tolist()], SCHEMA.field("input_ids").type),
        "attention_mask": pa.array([[1] * num_tokens], SCHEMA.field("attention_mask").type),
        "labels": pa.array(
            [np.where(is_prompt, _NO_LABEL, trace.token_ids).tolist()],
            SCHEMA.field("labels").type,
        ),
    }
    return pa.record_batch(plain | nested, schema=SCHEMA)
