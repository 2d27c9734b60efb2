"""The stream as a torch dataset, for users with a training loop of their own."""

from collections.abc import Iterator
from typing import Any

import torch.distributed
from torch import nn
from torch.utils.data import IterableDataset, get_worker_info

from student_train.batch.micro_batch import one_micro_batch
from student_train.data.stream import Cursor, TraceStream
from student_train.data.tokens import TokenSelection
from student_train.data.traces import TrainingData


class DistillationDataset(IterableDataset[dict[str, Any]]):
    """This process's part of every global batch, from the cursor to the last epoch.

    Give it to `DataLoader(dataset, batch_size=None)`, and let nothing else divide it among
    processes: each reads its own part. Items are dictionaries of

    - `batch`: a `MicroBatch`, one trace per row; where a process has none, one without loss tokens
    - `labels`: [1 + N] int64, the N tokens that enter the loss after one -100, as a causal model's
      labels begin: transformers' Trainer counts them over processes and accumulated batches, and
      gives what the summed loss is to be divided by
    """

    def __init__(
        self,
        data: TrainingData,
        selection: TokenSelection,
        *,
        batch_traces: int,
        num_epochs: int = 1,
        seed: int = 0,
        num_lanes: int = 8,
        cursor: Cursor | None = None,
        num_ids: int | None = None,
        hard_labels: bool = False,
    ) -> None:
        """Take the arguments of `TraceStream`; ranks are torch.distributed's where it runs.

        `num_ids` (a student that may have fewer ids than the teacher) and `hard_labels` (an
        objective with a cross entropy) are as in `micro_batches`.
        """
        super().__init__()
        self._data = data
        self._selection = selection
        self._batch_traces = batch_traces
        self._num_epochs = num_epochs
        self._seed = seed
        self._num_lanes = num_lanes
        self._cursor = cursor or Cursor()
        self._num_ids = num_ids
        self._hard_labels = hard_labels

    def __len__(self) -> int:
        """Number of global batches from the cursor to the end."""
        stream, cursor = self._stream(rank=0, num_ranks=1), self._cursor
        return max(0, (self._num_epochs - cursor.epoch) * stream.steps_per_epoch - cursor.step)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Read the stream anew from the cursor.

        Raises:
            CacheFormatError: If a shard is missing or damaged.
            ConnectionError: If a shard lies elsewhere and cannot be reached.
            RuntimeError: In a worker process of a DataLoader.
        """
        if get_worker_info() is not None:
            raise RuntimeError("DataLoader: use num_workers=0; the stream reads ahead by itself")
        rank, num_ranks = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        with self._stream(rank=rank, num_ranks=num_ranks) as stream:
            for step in stream:
                batch = one_micro_batch(
                    step.traces, num_ids=self._num_ids, hard_labels=self._hard_labels
                )
                labels = nn.functional.pad(batch.targets.target_ids, (1, 0), value=-100)
                yield {"batch": batch, "labels": labels}

    def _stream(self, *, rank: int, num_ranks: int) -> TraceStream:
        return TraceStream(
            self._data,
            self._selection,
            batch_traces=self._batch_traces,
            num_epochs=self._num_epochs,
            seed=self._seed,
            num_lanes=self._num_lanes,
            rank=rank,
            num_ranks=num_ranks,
            cursor=self._cursor,
        )
