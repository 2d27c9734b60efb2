"""The stream as a torch dataset, for users with a training loop of their own."""

import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch.distributed
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from student_train.batch.gloo_exchange import GlooExchange
from student_train.batch.loss_tokens import Teaching
from student_train.batch.micro_batch import DISTRIBUTIONS, one_micro_batch
from student_train.batch.trace_rows import trace_rows
from student_train.data.order import SHUFFLE_WINDOW
from student_train.data.stream import Cursor, TraceStream
from student_train.data.tokens import TokenSelection
from student_train.data.traces import TrainingData

if TYPE_CHECKING:
    import datasets

_ADVICE = (
    "use the loader that `dataset.loader()` gives, as tools/example_trainer.py does in "
    "get_train_dataloader; or, for a trainer that makes its own loader, `dataset.as_hf_dataset()` "
    "with `collate_traces`, as tools/example_sft_trainer.py does"
)


class DistillationDataset(IterableDataset[dict[str, Any]]):
    """This process's part of every global batch, from the cursor to the last epoch.

    Let `loader()` make its DataLoader, and let nothing else divide it among processes: each reads
    its own part. Items are dictionaries of

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
        cursor: Cursor | None = None,
        num_ids: int | None = None,
        teaching: Teaching = DISTRIBUTIONS,
        shuffle_window: float = SHUFFLE_WINDOW,
    ) -> None:
        """Take the arguments of `TraceStream`; ranks are torch.distributed's where it runs.

        `num_ids` (for a student that may have fewer ids than the teacher) and `teaching` are as in
        `micro_batches`.
        """
        super().__init__()
        self._data = data
        self._selection = selection
        self._batch_traces = batch_traces
        self._num_epochs = num_epochs
        self._seed = seed
        self._first = cursor or Cursor()
        self._end_epoch = num_epochs
        self._reached = self._first
        self._num_ids = num_ids
        self._teaching = teaching
        self._shuffle_window = shuffle_window
        self._exchange: GlooExchange | None = None  # made where processes are known

    def __len__(self) -> int:
        """Number of global batches from where the next iteration begins to its end."""
        stream, first = self._stream(rank=0, num_ranks=1), self._first
        return max(0, (self._end_epoch - first.epoch) * stream.steps_per_epoch - first.step)

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration begin with this epoch, which has an order of its own.

        Within the epoch of a cursor or of a loaded state, the iteration begins where that says.
        """
        if epoch != self._first.epoch:
            self._begin_at(Cursor(epoch, 0), epoch + self._num_epochs)

    def state_dict(self) -> dict[str, Any]:
        """Place after the last batch that was handed out, for `load_state_dict`.

        A loader that fetches ahead is ahead of training; `loader()`'s fetches one batch.
        """
        return {
            **self._reached.to_json(),
            "end_epoch": self._end_epoch,
            "shuffle_window": self._shuffle_window,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration begin where `state_dict` was called, with any number of ranks.

        Raises:
            ValueError: If it was called on a dataset of another order.
        """
        if state.get("shuffle_window") != self._shuffle_window:
            raise ValueError(
                f"state of a DistillationDataset: expected shuffle_window={self._shuffle_window}, "
                f"found {state.get('shuffle_window')}, which has another order; make the dataset "
                "with that one"
            )
        self._begin_at(Cursor.from_json(dict(state)), int(state["end_epoch"]))

    def _begin_at(self, cursor: Cursor, end_epoch: int) -> None:
        self._first = self._reached = cursor
        self._end_epoch = end_epoch

    def loader(self) -> "DataLoader[dict[str, Any]]":
        """A DataLoader whose `set_epoch` is this dataset's: trainers call it every epoch.

        It must not go through `accelerator.prepare`, which would divide it among processes again.
        """
        loader: DataLoader[dict[str, Any]] = prepare_data_loader(
            DataLoader(self, batch_size=None), num_processes=1, process_index=0,
            put_on_device=False, dispatch_batches=False,
        )  # fmt: skip
        loader.iteration = self._first.epoch
        return loader

    def as_hf_dataset(self) -> "datasets.IterableDataset":
        """The traces one by one, all epochs in turn, as a `datasets.IterableDataset`.

        For trainers that make loader and batches themselves: they divide it among processes, and
        each of these reads all of it. Rows are those of `trace_rows`, for `collate_traces`.

        Raises:
            ValueError: If something else than distributions is to teach, which rows do not hold.
        """
        if self._teaching != DISTRIBUTIONS:
            raise ValueError(
                f"as_hf_dataset: rows hold distributions alone, got {self._teaching}; use loader()"
            )
        import datasets

        return datasets.IterableDataset.from_generator(
            trace_rows,
            gen_kwargs={
                "data": self._data,
                "selection": self._selection,
                "num_epochs": self._num_epochs,
                "seed": self._seed,
                "first": self._first,
                "shuffle_window": self._shuffle_window,
            },
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Read the stream anew from the cursor.

        Raises:
            CacheFormatError: If a shard is missing or damaged.
            ConnectionError: If a shard lies elsewhere and cannot be reached.
            RuntimeError: In a worker process of a DataLoader, or in a loader that would batch the
                items or divide them among processes.
        """
        if get_worker_info() is not None:
            raise RuntimeError("DataLoader: use num_workers=0; the stream reads ahead by itself")
        _refuse_other_loaders()
        return self._items()

    def _items(self) -> Iterator[dict[str, Any]]:
        rank, num_ranks = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
            if self._exchange is None and num_ranks > 1:
                self._exchange = GlooExchange()
        with self._stream(rank=rank, num_ranks=num_ranks) as stream:
            for step in stream:
                batch = one_micro_batch(step.traces, num_ids=self._num_ids, teaching=self._teaching)
                labels = nn.functional.pad(batch.targets.target_ids.long(), (1, 0), value=-100)
                self._reached = step.cursor
                yield {"batch": batch, "labels": labels}

    def _stream(self, *, rank: int, num_ranks: int) -> TraceStream:
        return TraceStream(
            self._data,
            self._selection,
            batch_traces=self._batch_traces,
            num_epochs=self._end_epoch,
            seed=self._seed,
            rank=rank,
            num_ranks=num_ranks,
            exchange=self._exchange,
            cursor=self._first,
            shuffle_window=self._shuffle_window,
        )


def _refuse_other_loaders() -> None:
    """Refuse to be read by a loader that takes an item for one example of a batch.

    Only the callers' frames tell: a loader says nothing to its dataset, and what comes of it is an
    error about dtypes, or a process that waits for others that never read.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        reader = type(frame.f_locals.get("self")).__name__
        if reader == "_IterableDatasetFetcher" and frame.f_locals.get("auto_collation"):
            raise RuntimeError(
                "DataLoader: expected batch_size=None, got a loader that batches items, each of "
                f"which is a global batch already; {_ADVICE}"
            )
        if reader in ("DataLoaderDispatcher", "IterableDatasetShard"):
            raise RuntimeError(
                f"{reader} of accelerate would divide batches among processes, each of which "
                f"reads its own part already: keep the loader out of accelerator.prepare; {_ADVICE}"
            )
        frame = frame.f_back
