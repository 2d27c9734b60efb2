"""Traces of a cache in training order, cut to the tokens trained on, from any cursor.

order -> shards read when first needed -> global batches -> a bounded prefetch thread.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np

from student_train.data.draw import draw_spans
from student_train.data.order import check_ranks, data_order
from student_train.data.tokens import SelectedTrace, TokenSelection
from student_train.data.traces import TrainingData

PREFETCH_STEPS = 4
CLOSE_S = 10.0  # far more than reading a shard takes


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
    traces: list[SelectedTrace]  # of this rank, cut; perhaps none where there are several ranks
    trace_ids: tuple[str, ...]  # of the whole global batch, in its order
    bytes_read: int  # from shards by this rank, up to and with this batch


class TraceStream:
    """Global batches of `batch_traces` traces; iterate it once, inside a `with` block.

    The last batch of an epoch may be smaller. Every trace is seen exactly once per epoch.
    """

    def __init__(
        self,
        data: TrainingData,
        selection: TokenSelection,
        *,
        batch_traces: int,
        num_epochs: int,
        seed: int = 0,
        num_lanes: int = 8,
        rank: int = 0,
        num_ranks: int = 1,
        cursor: Cursor = Cursor(),
    ) -> None:
        """Describe a stream; nothing is read before it is entered.

        Args:
            data: The traces; nothing else reads their caches while the stream does.
            selection: Tokens trained on, which decide how many of a trace are read; for a
                mixture, every trace's lead span is drawn from the seed.
            batch_traces: Traces of a global batch, over all ranks.
            num_epochs: Epochs after which the stream ends.
            seed: Seed for the order, and for the lead spans of a mixture.
            num_lanes: Number of lanes; at least `num_ranks`, best a multiple of it.
            rank: Rank whose part is yielded.
            num_ranks: Number of ranks that share every global batch.
            cursor: Position to begin at; the batches are those of an uninterrupted stream.

        Raises:
            ValueError: If there are more ranks than lanes.
            CacheMismatchError: If more is selected than a truncated cache holds.
        """
        check_ranks(num_lanes, num_ranks, rank=rank)
        self._data = data
        self._drawn = [draw_spans(source, selection, seed) for source in data.sources]
        self._batch_traces = batch_traces
        self._num_epochs = num_epochs
        self._seed = seed
        self._num_lanes = num_lanes
        self._rank = rank
        self._num_ranks = num_ranks
        self._cursor = cursor
        self._prefetch: _Prefetch | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches of an epoch."""
        return steps_per_epoch(self._data.num_traces, self._batch_traces)

    @property
    def wait_s(self) -> float:
        """Seconds that the consumer has waited for data so far."""
        return self._prefetch.wait_s if self._prefetch else 0.0

    def __enter__(self) -> Self:
        self._prefetch = _Prefetch(self._steps(), PREFETCH_STEPS)
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
        order = data_order(self._data, seed=self._seed, epoch=epoch, num_lanes=self._num_lanes)
        mine = order.of_rank(self._rank, self._num_ranks)
        begin = min(first_step * self._batch_traces, len(order))
        ahead = np.flatnonzero(mine[begin:]) + begin
        rows_of_shard: dict[int, list[int]] = {}  # still to come, of this rank
        for place in ahead:
            rows_of_shard.setdefault(int(order.shard[place]), []).append(int(order.row[place]))
        open_shards: dict[int, dict[int, SelectedTrace]] = {}
        for step in range(first_step, self.steps_per_epoch):
            places = range(
                step * self._batch_traces, min((step + 1) * self._batch_traces, len(order))
            )
            traces, ids = [], []
            for place in places:
                shard, row = int(order.shard[place]), int(order.row[place])
                ids.append(self._data.info(shard % self._data.num_shards, row).trace_id)
                if not mine[place]:
                    continue
                if shard not in open_shards:
                    open_shards[shard] = self._read(shard, rows_of_shard.pop(shard))
                traces.append(open_shards[shard].pop(row))
                if not open_shards[shard]:
                    del open_shards[shard]
            is_last = step + 1 == self.steps_per_epoch
            cursor = Cursor(epoch + 1, 0) if is_last else Cursor(epoch, step + 1)
            yield StreamStep(cursor, epoch, traces, tuple(ids), self._data.bytes_read)

    def _read(self, shard: int, rows: list[int]) -> dict[int, SelectedTrace]:
        number, shard_of_cache = self._data.locate(shard % self._data.num_shards)
        source, drawn = self._data.sources[number], self._drawn[number]
        infos = source.cache.shards[shard_of_cache].traces
        selections = {row: drawn.of(shard_of_cache, row) for row in rows}
        keep = {row: selection.num_read(infos[row]) for row, selection in selections.items()}
        traces = source.cache.read(shard_of_cache, keep, source.view)
        return {row: SelectedTrace(trace, selections[row], number) for row, trace in traces.items()}


class _Prefetch(Iterator[StreamStep]):
    """Runs an iterator in one thread, at most `depth` items ahead."""

    def __init__(self, source: Iterator[StreamStep], depth: int) -> None:
        self.wait_s = 0.0
        self._source = source
        self._depth = depth
        self._items: deque[StreamStep] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._closed = False
        self._error: BaseException | None = None
        # A daemon, so that a consumer that dies without closing cannot keep the process alive.
        self._thread = threading.Thread(target=self._work, name="trace-stream", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            for item in self._source:
                with self._changed:
                    self._items.append(item)
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._closed or len(self._items) < self._depth)
                    if self._closed:
                        return
        except BaseException as error:  # every error is the consumer's: it is raised there
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def __next__(self) -> StreamStep:
        started_s = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._ended)
            self.wait_s += time.perf_counter() - started_s
            if self._items:
                self._changed.notify_all()
                return self._items.popleft()
        self._thread.join()
        if self._error is not None:
            raise self._error
        raise StopIteration

    def close(self) -> None:
        """End the thread, dropping what it had read ahead."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        # An unresponsive store is retried for minutes; closing does not wait for that.
        self._thread.join(CLOSE_S)
