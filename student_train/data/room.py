"""Room on the disk for traces that wait there, asked for before the first step of an epoch."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from socket import gethostname
from typing import Self

import numpy as np
from numpy.typing import NDArray

from student_train.data.waiting import no_room


@dataclass(frozen=True)
class DiskNeed:
    """What a rank will let wait on its disk at most, and the room that was there before."""

    disk: str  # machine and device: ranks with the same one share its room
    free_bytes: int
    least_bytes: float  # that surely go there
    most_bytes: float

    @classmethod
    def here(cls, least_bytes: float, most_bytes: float) -> Self:
        """The need of this process, in the folder for temporary files.

        Raises:
            OSError: If the folder cannot be looked at.
        """
        folder = tempfile.gettempdir()
        disk = f"{gethostname()} {Path(folder).stat().st_dev}"
        return cls(disk, shutil.disk_usage(folder).free, least_bytes, most_bytes)

    def packed(self) -> NDArray[np.uint8]:
        """The need as bytes, for other ranks."""
        return np.frombuffer(json.dumps(asdict(self)).encode(), np.uint8)

    @classmethod
    def unpacked(cls, data: NDArray[np.uint8]) -> Self:
        """Read what `packed` made."""
        return cls(**json.loads(data.tobytes()))

    def require_room(self, needs: Sequence[Self]) -> None:
        """Refuse a disk that is clearly too small for all who share it.

        Args:
            needs: Those of all ranks, this one included.

        Raises:
            OSError: On every rank with this disk.
        """
        shared = [need for need in needs if need.disk == self.disk]
        # Each closed its files of the epoch before, looked, told the others, and writes once all
        # have told: the last to look saw the disk without any of their files.
        free_bytes = max(need.free_bytes for need in shared)
        if sum(need.least_bytes for need in shared) > free_bytes:
            most_bytes = sum(need.most_bytes for need in shared)
            raise no_room(tempfile.gettempdir(), most_bytes, len(shared))
