"""One rank's traces of an epoch, each when it is due: a shard is read when its first trace is."""

import logging
import tempfile
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from student_train.data.draw import DrawnSpans
from student_train.data.order import EpochOrder
from student_train.data.room import DiskNeed
from student_train.data.spill import SLOT_BYTES
from student_train.data.traces import TrainingData
from student_train.data.waiting import WaitingTraces
from teacher_cache.format import KeepPolicy, Trace, TraceInfo

logger = logging.getLogger(__name__)

# Bytes of a trace over those that it takes in its shard, about, for a reasoning teacher's cache.
_UNPACKED = 3.5
_SPILLED = 1.4


class DueTraces:
    """Gives out traces by their places in the order; a `with` block frees memory and disk."""

    def __init__(
        self,
        data: TrainingData,
        drawn: Sequence[DrawnSpans],
        order: EpochOrder,
        places: NDArray[np.int64],
        memory_bytes: int,
    ) -> None:
        """Plan which rows of each shard to read; reads nothing.

        Args:
            data: The caches.
            drawn: What is selected of each cache's traces.
            order: The epoch's order.
            places: Places in it, rising, of the traces that will be taken.
            memory_bytes: As in `WaitingTraces`.
        """
        self._data, self._drawn, self._order = data, drawn, order
        by_shard = places[np.argsort(order.shard[places], kind="stable")]
        shards, firsts = np.unique(order.shard[by_shard], return_index=True)
        ends = [*firsts[1:].tolist(), len(places)]
        self._unread = {
            shard: by_shard[first:end]
            for shard, first, end in zip(shards.tolist(), firsts.tolist(), ends, strict=False)
        }
        self._places, self._memory_bytes = places, memory_bytes
        self._waiting = WaitingTraces(memory_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._waiting.close()

    def take(self, place: int, info: TraceInfo) -> Trace:
        """The trace at a place, once.

        Args:
            place: One of the places, in their order.
            info: The trace's commit record.

        Raises:
            CacheFormatError: If its shard is missing or damaged.
            ConnectionError: If it lies elsewhere and cannot be reached.
            OSError: If traces that must wait find no room on the disk.
        """
        shard = int(self._order.shard[place])
        if shard in self._unread:
            self._read(shard, self._unread.pop(shard))
        return self._waiting.take(place, info)

    def disk_need(self) -> DiskNeed:
        """Room on the disk that will be needed for what waits at any time.

        Raises:
            OSError: If the folder for temporary files cannot be looked at.
        """
        shard = self._order.shard[self._places]
        num_bytes = self._stored_bytes(shard, self._order.row[self._places])
        least_bytes = most_waiting(shard, num_bytes)
        if least_bytes * _UNPACKED <= self._memory_bytes:
            return DiskNeed.here(0, 0)
        slots = np.ceil(num_bytes * _SPILLED / SLOT_BYTES)
        most_bytes = most_waiting(shard, slots * SLOT_BYTES)
        logger.info(
            "up to %.1f GB of this process' traces wait for their turn in %s",
            most_bytes / 1e9, tempfile.gettempdir(),
        )  # fmt: skip
        # Of narrowed rows it is not known how much less they take.
        is_whole = all(
            each.view == KeepPolicy(each.cache.header.top_k, 1.0) for each in self._data.sources
        )
        surely_bytes = max(0.0, least_bytes - self._memory_bytes) if is_whole else 0.0
        return DiskNeed.here(surely_bytes, most_bytes)

    def _read(self, shard: int, places: NDArray[np.int64]) -> None:
        number, shard_of_cache = self._data.locate(shard % self._data.num_shards)
        source, drawn = self._data.sources[number], self._drawn[number]
        infos = source.cache.shards[shard_of_cache].traces
        place_of_row = dict(zip(self._order.row[places].tolist(), places.tolist(), strict=True))
        keep = {row: drawn.of(shard_of_cache, row).num_read(infos[row]) for row in place_of_row}
        traces = source.cache.read(shard_of_cache, keep, source.view)
        self._waiting.add({place_of_row[row]: trace for row, trace in traces.items()})

    def _stored_bytes(
        self, shard: NDArray[np.int64], row: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """[n] Bytes that the selected tokens of n traces take in their shards, on average."""
        per_token = []
        for source in self._data.sources:
            catalog = source.cache.catalog
            num_tokens = np.add.reduceat(catalog.num_held, catalog.first_row[:-1])
            per_token.append(catalog.band_ends[:, -1] / num_tokens)
        shard = shard % self._data.num_shards
        num_read = self._data.values_at([d.num_read_by_row for d in self._drawn], shard, row)
        stored: NDArray[np.float64] = num_read * np.concatenate(per_token)[shard]
        return stored


def most_waiting(shard: NDArray[np.int64], amount: NDArray[np.float64]) -> float:
    """The largest amount that waits at any time.

    Args:
        shard: [n] shard of each trace, in the order in which they are taken.
        amount: [n] what each of them adds from when its shard is read until it is taken.
    """
    if not len(shard):
        return 0.0
    _, first, of_trace = np.unique(shard, return_index=True, return_inverse=True)
    added = np.bincount(first[of_trace], weights=amount, minlength=len(shard))
    return float((np.cumsum(added) - np.cumsum(amount)).max())
