"""Traces of a cache in training order, cut to the tokens trained on, from any cursor.

order -> shards read when first needed, whose traces wait for their turn -> global batches, shared
by ranks -> a bounded prefetch thread.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from student_train.data.dealing import Dealing, deal
from student_train.data.draw import draw_spans
from student_train.data.due import DueTraces
from student_train.data.exchange import TraceExchange, handed_over
from student_train.data.order import SHUFFLE_WINDOW, EpochOrder, data_order
from student_train.data.prefetch import Prefetch
from student_train.data.room import DiskNeed
from student_train.data.tokens import SelectedTrace, TokenSelection
from student_train.data.traces import TrainingData
from student_train.data.waiting import MEMORY_BYTES
from teacher_cache.format import CacheError, Trace, TraceInfo

PREFETCH_STEPS = 4

_T = TypeVar("_T")


def steps_per_epoch(num_traces: int, batch_traces: int) -> int:
    """Number of global batches of an epoch; the last one may be smaller."""
    return math.ceil(num_traces / batch_traces)


def num_steps(num_traces: int, batch_traces: int, *, epochs: int, limit: int | None) -> int:
    """Number of global batches of a run, which ends after the given epochs or steps."""
    in_epochs = epochs * steps_per_epoch(num_traces, batch_traces)
    return in_epochs if limit is None else min(in_epochs, limit)


@dataclass(frozen=True)
class Cursor:
    """Position of a stream: this many global batches of this epoch have been yielded."""

    epoch: int = 0
    step: int = 0

    def to_json(self) -> dict[str, int]:
        """The cursor as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Cursor":
        """Read what `to_json` wrote."""
        return cls(int(values["epoch"]), int(values["step"]))


@dataclass(frozen=True)
class StreamStep:
    """One rank's part of a global batch."""

    cursor: Cursor  # after this batch
    epoch: int  # that this batch belongs to
    traces: list[SelectedTrace]  # that this rank trains on, cut; of several ranks some have none
    trace_ids: tuple[str, ...]  # of the whole global batch, in its order
    bytes_read: int  # from shards by this rank, up to and with this batch


class TraceStream:
    """Global batches of `batch_traces` traces; iterate it once, inside a `with` block.

    The last batch of an epoch may be smaller. Every trace is seen exactly once per epoch. Ranks
    share every batch by the tokens of its traces, whatever shards they are in.
    """

    def __init__(
        self,
        data: TrainingData,
        selection: TokenSelection,
        *,
        batch_traces: int,
        num_epochs: int,
        seed: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        exchange: TraceExchange | None = None,
        cursor: Cursor = Cursor(),
        shuffle_window: float = SHUFFLE_WINDOW,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        """Describe a stream; nothing is read before it is entered.

        Args:
            data: The traces; nothing else reads their caches while the stream does.
            selection: Tokens trained on, which decide how many of a trace are read; for a
                mixture, every trace's lead span is drawn from the seed.
            batch_traces: Traces of a global batch, over all ranks.
            num_epochs: Epochs after which the stream ends.
            seed: Seed for the order, and for the lead spans of a mixture.
            rank: Rank whose part is yielded.
            num_ranks: Number of ranks that share every global batch.
            exchange: Transport of traces among them, with which each shard is read once. Without
                it each rank reads what it trains on: up to `num_ranks` times the bytes.
            cursor: Position to begin at; the batches are those of an uninterrupted stream.
            shuffle_window: Share of the shards whose traces are mixed at any time; see
                `epoch_order`.
            memory_bytes: Most that waits in this process' memory for its turn; more waits on the
                disk, compressed.

        Raises:
            CacheMismatchError: If more is selected than a truncated cache holds.
        """
        self._data = data
        self._drawn = [draw_spans(source, selection, seed) for source in data.sources]
        self._batch_traces = batch_traces
        self._num_epochs = num_epochs
        self._seed = seed
        self._rank = rank
        self._num_ranks = num_ranks
        self._exchange = exchange
        self._cursor = cursor
        self._window = shuffle_window
        self._memory_bytes = memory_bytes
        self._prefetch: Prefetch[StreamStep] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches of an epoch."""
        return steps_per_epoch(self._data.num_traces, self._batch_traces)

    @property
    def wait_s(self) -> float:
        """Seconds that the consumer has waited for data so far."""
        return self._prefetch.wait_s if self._prefetch else 0.0

    def prefetched(self, prepare: Callable[[StreamStep], _T]) -> Prefetch[_T]:
        """The same batches, each prepared by a function in the thread that reads ahead.

        An alternative to the `with` block of the stream: close what it returns instead.

        Args:
            prepare: Function that only the thread calls; what it raises, the consumer gets.
        """
        is_shared = self._exchange is not None
        return Prefetch(map(prepare, self._steps()), PREFETCH_STEPS, is_shared=is_shared)

    def __enter__(self) -> Self:
        self._prefetch = self.prefetched(lambda step: step)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._prefetch:
            self._prefetch.close()

    def __iter__(self) -> Iterator[StreamStep]:
        """The batches from the cursor on.

        Raises:
            CacheFormatError: If a shard is missing or damaged.
            ConnectionError: If a shard lies elsewhere and cannot be reached.
            RuntimeError: Outside a `with` block.
        """
        if self._prefetch is None:
            raise RuntimeError("iterate a TraceStream inside `with stream:`")
        return self._prefetch

    def _steps(self) -> Iterator[StreamStep]:
        for epoch in range(self._cursor.epoch, self._num_epochs):
            first = self._cursor.step if epoch == self._cursor.epoch else 0
            yield from self._epoch_steps(epoch, first)

    def _epoch_steps(self, epoch: int, first_step: int) -> Iterator[StreamStep]:
        order = data_order(self._data, seed=self._seed, epoch=epoch, window=self._window)
        begin = min(first_step * self._batch_traces, len(order))
        dealing = self._dealt(order, begin)
        reads = dealing.reads(self._rank) + begin
        with self._or_give_up():
            planned = DueTraces(self._data, self._drawn, order, reads, self._memory_bytes)
            need = planned.disk_need()
        self._require_room(need)
        with planned as due:
            for step in range(first_step, self.steps_per_epoch):
                batch = slice(step * self._batch_traces, (step + 1) * self._batch_traces)
                shards, rows = order.shard[batch].tolist(), order.row[batch].tolist()
                places = list(zip(shards, rows, strict=True))
                infos = [
                    self._data.info(shard % self._data.num_shards, row) for shard, row in places
                ]
                here = slice(batch.start - begin, batch.stop - begin)
                reader, trainer = dealing.reader[here].tolist(), dealing.trainer[here].tolist()
                mine = handed_over(
                    self._due(due, batch.start, infos, reader), infos,
                    reader=reader, trainer=trainer,
                    rank=self._rank, num_ranks=self._num_ranks, exchange=self._exchange,
                )  # fmt: skip
                traces = [self._selected(trace, *places[index]) for index, trace in mine.items()]
                is_last = step + 1 == self.steps_per_epoch
                cursor = Cursor(epoch + 1, 0) if is_last else Cursor(epoch, step + 1)
                ids = tuple(info.trace_id for info in infos)
                yield StreamStep(cursor, epoch, traces, ids, self._data.bytes_read)

    def _require_room(self, need: DiskNeed) -> None:
        """Refuse a disk that is too small before the first step, not in the middle of an epoch."""
        needs = [need]
        if self._exchange is not None:
            parts = self._exchange.swap([need.packed()] * self._num_ranks)
            needs = [DiskNeed.unpacked(part) for part in parts]
        with self._or_give_up():
            need.require_room(needs)

    def _due(
        self, due: DueTraces, first: int, infos: Sequence[TraceInfo], reader: Sequence[int]
    ) -> dict[int, Trace]:
        """The traces of a batch that this rank reads, by their index in it."""
        here = [index for index, rank in enumerate(reader) if rank == self._rank]
        with self._or_give_up():
            return {index: due.take(first + index, infos[index]) for index in here}

    @contextmanager
    def _or_give_up(self) -> Iterator[None]:
        """Tell the other ranks of an error here, or they would wait for this one's traces."""
        try:
            yield
        except (CacheError, OSError):
            if self._exchange is not None:
                self._exchange.give_up()
            raise

    def _dealt(self, order: EpochOrder, begin: int) -> Dealing:
        """Who reads and who trains on each trace of the order from `begin` on."""
        shard, row = order.shard[begin:], order.row[begin:]
        if self._num_ranks == 1:
            alone = np.zeros(len(shard), np.int64)
            return Dealing(alone, alone)
        num_read = [drawn.num_read_by_row for drawn in self._drawn]
        num_tokens = self._data.values_at(num_read, shard % self._data.num_shards, row)
        return deal(
            shard, num_tokens, batch_traces=self._batch_traces, num_ranks=self._num_ranks,
            can_exchange=self._exchange is not None,
        )  # fmt: skip

    def _selected(self, trace: Trace, shard: int, row: int) -> SelectedTrace:
        number, shard_of_cache = self._data.locate(shard % self._data.num_shards)
        return SelectedTrace(trace, self._drawn[number].of(shard_of_cache, row), number)
