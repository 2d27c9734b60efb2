"""Traces as rows of plain lists, and the collator that makes a batch of them.

For trainers that make their own loader (transformers' Trainer without overrides, TRL): they count
examples and divide them among processes; see `DistillationDataset.as_hf_dataset`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from student_train.batch.loss_tokens import valid_positions
from student_train.batch.micro_batch import one_micro_batch
from student_train.data.stream import Cursor, TraceStream
from student_train.data.tokens import SelectedTrace, TokenSelection
from student_train.data.traces import TrainingData
from teacher_cache.format import Trace


def trace_rows(
    data: TrainingData,
    selection: TokenSelection,
    num_epochs: int,
    seed: int,
    first: Cursor,
    shuffle_window: float,
) -> Iterator[dict[str, Any]]:
    """The traces of all epochs in training order, cut to the tokens trained on.

    Yields:
        `input_ids` [m]; and, as in `Trace`, `k` and `tail_logit` [m], `top_ids` and `top_logits`
        [E], with entries for the tokens that enter the loss alone.
    """
    with TraceStream(
        data, selection, batch_traces=1, num_epochs=num_epochs, seed=seed, cursor=first,
        shuffle_window=shuffle_window,
    ) as stream:  # fmt: skip
        for step in stream:
            for item in step.traces:
                yield _row(item)


def _row(item: SelectedTrace) -> dict[str, Any]:
    trace = item.trace
    is_trained = np.zeros(len(trace), np.bool_)
    is_trained[valid_positions(trace, item.selection)] = True
    of_trained = np.repeat(is_trained, trace.k)
    return {
        "input_ids": trace.token_ids,
        "k": np.where(is_trained, trace.k, 0),
        "tail_logit": trace.tail_logit,
        "top_ids": trace.top_ids[of_trained],
        "top_logits": trace.top_logits[of_trained],
    }


def collate_traces(
    rows: Sequence[Mapping[str, Any]], *, num_ids: int | None = None
) -> dict[str, Any]:
    """Make a batch of rows of `trace_rows`.

    Args:
        rows: Rows, one per trace.
        num_ids: As in `micro_batches`.

    Returns:
        `batch`, a `MicroBatch`; its `input_ids` and `labels` [B, T], -100 where a token does not
        enter the loss, which trainers count to know what the summed loss is to be divided by.
    """
    traces = [_trace(row, number) for number, row in enumerate(rows)]
    batch = one_micro_batch(TokenSelection().selected(traces), num_ids=num_ids)
    labels = torch.full((batch.input_ids.shape[0], batch.input_ids.shape[1] + 1), -100)
    width = batch.input_ids.shape[1]
    index, targets = batch.hidden_index, batch.targets.target_ids.long()
    labels[index // width, index % width + 1] = targets
    return {"batch": batch, "input_ids": batch.input_ids.long(), "labels": labels}


def _trace(row: Mapping[str, Any], number: int) -> Trace:
    num_tokens = len(row["input_ids"])
    return Trace(
        trace_id=f"row {number}",
        token_ids=np.asarray(row["input_ids"], np.int32),
        n_total=num_tokens,
        cot_start=0,
        answer_start=num_tokens,
        k=np.asarray(row["k"], np.uint8),
        top_ids=np.asarray(row["top_ids"], np.int32),
        top_logits=np.asarray(row["top_logits"], np.float32),
        tail_logit=np.asarray(row["tail_logit"], np.float32),
    )
