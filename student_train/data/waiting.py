"""Traces that were read with their shard and wait for their turn in the order.

Those that are due first wait in memory, the others compressed on the disk: wide shuffling keeps
a third of an epoch waiting and more, and a shard is read but once.
"""

import errno
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from student_train.data.exchange import packed, packed_bytes, unpacked
from student_train.data.spill import Spilled, SpillFile
from teacher_cache.format import Trace, TraceInfo

MEMORY_BYTES = 1 << 29  # of waiting traces per process, after a shard was read


@dataclass(frozen=True)
class _OnDisk:
    spilled: Spilled
    num_bytes: int  # unpacked


class WaitingTraces:
    """Traces by their place in an epoch's order, until they are taken or it is closed."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        """Hold nothing yet.

        Args:
            memory_bytes: Most that waits in memory; what is due last goes to the disk.
        """
        self.memory_bytes = 0  # waiting in memory now
        self._most_bytes = memory_bytes
        self._in_memory: dict[int, tuple[Trace, int]] = {}  # and its bytes
        self._on_disk: dict[int, _OnDisk] = {}
        self._spill = SpillFile()
        self._codec = pa.Codec("zstd", compression_level=1)

    @property
    def disk_bytes(self) -> int:
        """Size of the temporary file, which never shrinks."""
        return self._spill.num_bytes

    def add(self, traces: Mapping[int, Trace]) -> None:
        """Let traces wait, by their places.

        Raises:
            OSError: If the disk has no room for them.
        """
        for place, trace in traces.items():
            num_bytes = packed_bytes(trace)
            self._in_memory[place] = (trace, num_bytes)
            self.memory_bytes += num_bytes
        if self.memory_bytes > self._most_bytes:
            for place in sorted(self._in_memory, reverse=True):
                if self.memory_bytes <= self._most_bytes:
                    break
                self._to_disk(place)

    def _to_disk(self, place: int) -> None:
        trace, num_bytes = self._in_memory.pop(place)
        self.memory_bytes -= num_bytes
        data = self._codec.compress(packed([trace]), asbytes=True)
        try:
            self._on_disk[place] = _OnDisk(self._spill.put(data), num_bytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise no_room(tempfile.gettempdir(), len(data)) from error

    def take(self, place: int, info: TraceInfo) -> Trace:
        """The trace of a place, which waits no longer.

        Args:
            place: Its place in the order.
            info: Its commit record.
        """
        if place in self._in_memory:
            trace, num_bytes = self._in_memory.pop(place)
            self.memory_bytes -= num_bytes
            return trace
        found = self._on_disk.pop(place)
        data = self._codec.decompress(self._spill.take(found.spilled), found.num_bytes)
        (trace,) = unpacked(np.frombuffer(data, np.uint8), [info])
        return trace

    def close(self) -> None:
        """Free the disk."""
        self._spill.close()


def no_room(folder: str, num_bytes: float, num_processes: int = 1) -> OSError:
    """The error of a disk that is too small for the traces that wait."""
    whose = f" of {num_processes} processes" if num_processes > 1 else ""
    return OSError(
        errno.ENOSPC,
        f"{folder}: no room for {num_bytes:,.0f} more bytes of traces{whose} that wait for their "
        "turn. Set TMPDIR to a folder on a larger disk, or mix fewer shards (--shuffle-window)",
    )
