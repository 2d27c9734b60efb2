"""A ring of rows in shared memory: vLLM's worker writes, this process reads.

The memory is an anonymous file of the reader, which the writer opens through `/proc`: it ends with
the reader, however that ends, and needs no room in `/dev/shm`, of which containers have little.

A row is `HEAD_WORDS` + 2 (1 + K) 32-bit words: slot, serial number and position of its request,
the logarithm of the mass outside its K candidates, the ids of the token itself and of the
candidates, and their logprobs.
"""

import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

HEAD_WORDS = 4  # slot, serial, position, tail
# int64 fields of the start
_WRITTEN, _READ, _NUM_WRITERS, _NUM_CANDIDATES, _CAPACITY, _IS_CLOSED = range(6)
_START_BYTES = 4096
_WAIT_S = 0.0005
_LOOK_S = 1.0  # interval at which a writer that waits looks for the reader


class ReaderGoneError(RuntimeError):
    """Nobody reads the rows any more."""


def row_words(num_candidates: int) -> int:
    """Words of a row with K candidates."""
    return HEAD_WORDS + 2 * (1 + num_candidates)


class RowRing:
    """One end of the ring; `made` gives the reader's, `opened` the writer's."""

    def __init__(self, descriptor: int, address: str) -> None:
        """Map the memory of an open file, which the writer finds at `address`."""
        self.address = address
        self._descriptor = descriptor
        self._memory = mmap.mmap(descriptor, 0)
        self._start = np.frombuffer(self._memory, np.int64, _START_BYTES // 8)
        self.num_candidates = int(self._start[_NUM_CANDIDATES])
        self._capacity = int(self._start[_CAPACITY])
        self.row_words = row_words(self.num_candidates)
        words = np.frombuffer(self._memory, np.int32, offset=_START_BYTES)
        self._rows = words.reshape(self._capacity, self.row_words)
        self._fence = threading.Lock()

    @classmethod
    def made(cls, capacity: int, num_candidates: int) -> Self:
        """The reader's end of a new ring.

        Args:
            capacity: Rows that it holds; a writer waits when it is full.
            num_candidates: K of its rows.
        """
        descriptor = os.memfd_create("rows-of-a-teacher")
        start = np.zeros(_START_BYTES // 8, np.int64)
        start[_NUM_CANDIDATES], start[_CAPACITY] = num_candidates, capacity
        os.write(descriptor, start.tobytes())
        os.truncate(descriptor, _START_BYTES + capacity * row_words(num_candidates) * 4)
        return cls(descriptor, f"/proc/{os.getpid()}/fd/{descriptor}")

    @classmethod
    def opened(cls, address: str) -> Self:
        """The writer's end.

        Raises:
            OSError: If the reader is gone, or is not of this machine or user.
        """
        descriptor = os.open(address, os.O_RDWR)
        try:
            ring = cls(descriptor, address)
        finally:
            os.close(descriptor)
        ring._start[_NUM_WRITERS] += 1
        return ring

    @property
    def num_writers(self) -> int:
        """How often the ring was opened for writing; one writer is right."""
        return int(self._start[_NUM_WRITERS])

    def write(self, rows: NDArray[np.int32]) -> None:
        """Append rows [n, words], waiting for room.

        Raises:
            ReaderGoneError: If there is no room and the reader is gone.
        """
        while len(rows):
            written = int(self._start[_WRITTEN])
            room = min(
                self._capacity - (written - int(self._start[_READ])),
                self._capacity - written % self._capacity,
                len(rows),
            )
            if room == 0:
                self._wait_for_room(written)
                continue
            at = written % self._capacity
            self._rows[at : at + room] = rows[:room]
            self._order()
            self._start[_WRITTEN] = written + room
            rows = rows[room:]

    def _wait_for_room(self, written: int) -> None:
        look_at_s = time.monotonic()
        while written - int(self._start[_READ]) == self._capacity:
            if time.monotonic() >= look_at_s:
                # A closed descriptor's number may be another file's by now.
                if self._start[_IS_CLOSED] or not Path(self.address).exists():
                    raise ReaderGoneError("the process that reads the teacher's rows is gone")
                look_at_s += _LOOK_S
            time.sleep(_WAIT_S)

    def read(self) -> Iterator[NDArray[np.int32]]:
        """Yield what was written so far, as views [n, words] that are valid until the next one."""
        written, read = int(self._start[_WRITTEN]), int(self._start[_READ])
        self._order()
        while read < written:
            at = read % self._capacity
            num_rows = min(written - read, self._capacity - at)
            yield self._rows[at : at + num_rows]
            read += num_rows
            self._order()
            self._start[_READ] = read

    def _order(self) -> None:
        """Keep the order of memory accesses before and after, which ARM processors may change."""
        for _ in range(2):
            with self._fence:
                pass

    def close(self) -> None:
        """Give up the reader's end: a writer that waits ends with an error."""
        self._start[_IS_CLOSED] = 1
        os.close(self._descriptor)
