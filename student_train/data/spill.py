"""Byte strings in a temporary file without a name: its room is free again when the process ends."""

import os
import tempfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

SLOT_BYTES = 1 << 14  # half of one is wasted on average: a tenth of a trace of 4,000 tokens


@dataclass(frozen=True)
class Spilled:
    """Where one byte string lies."""

    slots: NDArray[np.int32]  # in order
    num_bytes: int
    crc32: int


class SpillFile:
    """A file of slots in the folder for temporary files (TMPDIR); room that was read is used again.

    Nothing is created before the first byte is written.
    """

    def __init__(self) -> None:
        self._num_slots = 0  # of the file
        self._free: list[int] = []

    @cached_property
    def _file(self) -> BinaryIO:
        return tempfile.TemporaryFile(prefix="leadspan-", buffering=0)

    @property
    def num_bytes(self) -> int:
        """Size of the file, which never shrinks."""
        return self._num_slots * SLOT_BYTES

    def put(self, data: bytes) -> Spilled:
        """Write a byte string.

        Raises:
            OSError: If the disk has no room for it.
        """
        num_needed = -(-len(data) // SLOT_BYTES)
        num_new = max(0, num_needed - len(self._free))
        slots = [self._free.pop() for _ in range(num_needed - num_new)]
        slots += range(self._num_slots, self._num_slots + num_new)
        self._num_slots += num_new
        view = memoryview(data)
        for number, slot in enumerate(slots):
            part = view[number * SLOT_BYTES : (number + 1) * SLOT_BYTES]
            _write(self._file.fileno(), part, slot * SLOT_BYTES)
        return Spilled(np.array(slots, np.int32), len(data), zlib.crc32(data))

    def take(self, spilled: Spilled) -> bytes:
        """Read a byte string and free its room.

        Raises:
            OSError: If the disk gives back other bytes than were written.
        """
        slots = spilled.slots.tolist()
        data = b"".join(os.pread(self._file.fileno(), SLOT_BYTES, s * SLOT_BYTES) for s in slots)
        data = data[: spilled.num_bytes]
        if zlib.crc32(data) != spilled.crc32:
            raise OSError(
                f"{tempfile.gettempdir()}: a temporary file gives back other bytes than were "
                "written to it; set TMPDIR to another disk and run the same command again"
            )
        self._free.extend(slots)
        return data

    def close(self) -> None:
        """Free the disk."""
        if "_file" in vars(self):
            self._file.close()


def _write(file: int, data: memoryview, offset: int) -> None:
    while len(data):
        done = os.pwrite(file, data, offset)
        data, offset = data[done:], offset + done
