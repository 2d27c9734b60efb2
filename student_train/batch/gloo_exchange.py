"""Exchange of traces among processes over gloo, beside the communication of training."""

from collections.abc import Sequence
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

# A rank waits here for as long as another one measures, saves, or waits for a slow store.
TIMEOUT = timedelta(hours=2)
_GAVE_UP = -1


class GlooExchange:
    """A `TraceExchange` over a process group of its own, which one thread may use at a time."""

    def __init__(self, ranks: Sequence[int] | None = None) -> None:
        """Create the group; every process of it does so at the same point.

        Args:
            ranks: Processes among which traces are exchanged; None for all.
        """
        self._group = dist.new_group(
            ranks, backend="gloo", timeout=TIMEOUT, use_local_synchronization=ranks is not None
        )
        self._num_ranks = dist.get_world_size(self._group)

    def swap(self, parts: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """Send each rank its part; return the parts that the ranks sent here.

        Raises:
            ConnectionError: If another rank gave up or is gone.
        """
        sizes = self._swap_sizes([len(part) for part in parts])
        gave_up = [rank for rank, size in enumerate(sizes) if size == _GAVE_UP]
        if gave_up:
            raise ConnectionError(
                f"process {gave_up[0]} cannot go on reading the cache; its own message says why"
            )
        received = torch.empty(sum(sizes), dtype=torch.uint8)
        sent = torch.from_numpy(np.concatenate(parts))
        self._all_to_all(received, sent, sizes, [len(part) for part in parts])
        return np.split(received.numpy(), np.cumsum(sizes)[:-1])

    def give_up(self) -> None:
        """Answer the others' next `swap` with the news that this rank cannot go on."""
        self._swap_sizes([_GAVE_UP] * self._num_ranks)

    def _swap_sizes(self, sizes: list[int]) -> list[int]:
        received = torch.empty(self._num_ranks, dtype=torch.int64)
        self._all_to_all(received, torch.tensor(sizes))
        found: list[int] = received.tolist()
        return found

    def _all_to_all(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_sizes: list[int] | None = None,
        sent_sizes: list[int] | None = None,
    ) -> None:
        try:
            dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=self._group)
        except RuntimeError as error:  # gloo's only error
            reason = str(error).partition("\n")[0]
            raise ConnectionError(
                f"another process of this run is gone while traces were exchanged ({reason}); run "
                "the same command again to resume"
            ) from error
