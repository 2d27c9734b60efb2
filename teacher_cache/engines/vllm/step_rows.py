"""Rows of one engine step, on the device of its logits.

A row is whole once its token is drawn. Until then a `Step` keeps what is needed of the logits,
which the sampler changes in place.

Letters: n rows, V vocabulary, K candidates per row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.engines.vllm.ring import HEAD_WORDS, RowRing, row_words

_SORTED_AT_ONCE = 1 << 20  # logits; their keys then fit a cache
_WIDE = 16_384  # vocabulary from which on PyTorch's top-k, a heap, is faster than sorting keys


@dataclass(frozen=True)
class Copy:
    """Rows [n, words], as the ring has them, on their way to the host, which need not wait."""

    rows: torch.Tensor
    is_there: Callable[[], bool]


class Outbox:
    """The way of rows into the ring, in their order, as their copies reach the host."""

    def __init__(self, ring: RowRing | None) -> None:
        """Write into this ring; None in a worker whose rows do not count."""
        self.ring = ring
        self._on_the_way: list[Copy] = []

    def add(self, copy: Copy) -> None:
        """Send these too; a step on a CPU is written at once."""
        self._on_the_way.append(copy)
        self.send()

    def send(self) -> None:
        """Write what has reached the host; raises as `RowRing.write`."""
        while self.ring is not None and self._on_the_way and self._on_the_way[0].is_there():
            words: NDArray[np.int32] = self._on_the_way.pop(0).rows.numpy()
            is_drawn = words[:, HEAD_WORDS] >= 0
            self.ring.write(words if is_drawn.all() else words[is_drawn])


class Step(Protocol):
    """Rows whose own tokens are not drawn yet."""

    def rows(self) -> Copy:
        """The rows, now that their tokens are drawn."""
        ...


class RowMaker:
    """Makes the rows of one step after the other.

    The tail of a row is the log-sum-exp of the logits outside the candidates, exact however small
    it is, which 1 minus the mass of the candidates is not.
    """

    def __init__(self) -> None:
        self._room: _Room | None = None

    def started(
        self,
        heads: NDArray[np.int32],
        logits: torch.Tensor,
        drawn: Callable[[], torch.Tensor],
        num_candidates: int,
    ) -> Step:
        """What is kept of a step until its tokens are drawn; on a CPU until the next step.

        Args:
            heads: [n, 3] slot, serial, position.
            logits: [n, V] float32.
            drawn: Reads the tokens [n] later, -1 where none was drawn after all.
            num_candidates: K, the same for all steps.
        """
        if logits.device.type != "cpu":
            top, ids = torch.topk(logits, num_candidates, dim=1)
            copy, log_sum = _outside(logits, top, ids)
            return DeviceStep(heads, ids, top, copy, log_sum, drawn)
        if self._room is None or not self._room.holds(logits):
            self._room = _Room(len(logits), logits.shape[1], num_candidates)
        return HostStep(heads, logits.numpy(), drawn, self._room)


class _Room:
    """Memory of a step on a CPU: new memory would cost more, page by page, than all arithmetic."""

    def __init__(self, num_rows: int, width: int, num_candidates: int) -> None:
        num_at_once = min(num_rows, max(1, _SORTED_AT_ONCE // width))
        self.num_candidates = num_candidates
        self.copy = np.empty((num_rows, width), np.float32)
        self.rows = np.empty((num_rows, row_words(num_candidates)), np.int32)
        self.total = np.empty(num_rows, np.float32)
        self.keys = np.empty((num_at_once, width), np.int64)
        self.work = np.empty((num_at_once, width), np.int32)
        self.places = np.arange(width - 1, -1, -1)  # from the end
        self.begins = np.arange(0, num_at_once * width, width)[:, None]  # of rows laid out flat

    def holds(self, logits: torch.Tensor) -> bool:
        return len(logits) <= len(self.copy) and logits.shape[1] == self.copy.shape[1]

    def top_ids(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """[n, K] ids of the largest logits [n, V], falling.

        NumPy's partial sort of keys takes a third of the time of PyTorch's top-k.
        """
        if logits.shape[1] >= _WIDE:
            found = torch.topk(torch.from_numpy(logits), self.num_candidates, dim=1)
            return found.indices.numpy()
        bits, work, keys = logits.view(np.int32), self.work[: len(logits)], self.keys[: len(logits)]
        # Integers in the order of the floats, each above the place of its id.
        np.right_shift(bits, 31, out=work)
        work &= 0x7FFFFFFF
        work ^= bits
        keys[:] = work
        keys <<= 32
        keys |= self.places
        keys.partition(keys.shape[1] - self.num_candidates, axis=1)
        top = np.sort(keys[:, keys.shape[1] - self.num_candidates :], axis=1)[:, ::-1]
        ids: NDArray[np.int64] = keys.shape[1] - 1 - (top & 0xFFFFFFFF)
        return ids


class HostStep:
    """A step on a CPU, in NumPy."""

    def __init__(
        self,
        heads: NDArray[np.int32],
        logits: NDArray[np.float32],
        drawn: Callable[[], torch.Tensor],
        room: _Room,
    ) -> None:
        self._drawn, self._room = drawn, room
        self._num_rows = len(logits)
        room.copy[: len(logits)] = logits
        room.rows[: len(logits), : HEAD_WORDS - 1] = heads
        for begin in range(0, len(logits), len(room.keys)):
            self._fill(slice(begin, min(begin + len(room.keys), len(logits))))

    def _fill(self, part: slice) -> None:
        """Write everything but the token itself of some rows, and note their log-sum-exp."""
        room, num_candidates = self._room, self._room.num_candidates
        logits, floats = room.copy[part], room.rows[part].view(np.float32)
        ids = room.top_ids(logits)
        places = ids + room.begins[: len(logits)]
        top = logits.ravel().take(places)
        largest, smallest = top[:, 0], top[:, -1]
        outside = room.work[: len(logits)].view(np.float32)
        # Where all are -inf, or one is NaN, so is the row, which is refused later.
        with np.errstate(divide="ignore", invalid="ignore"):
            np.subtract(logits, top[:, -1:], out=outside)
            outside.ravel()[places] = -np.inf
            np.exp(outside, out=outside)
            log_sum = np.log(outside.sum(axis=1)) + smallest
            log_sum = np.where(smallest > -np.inf, log_sum, -np.inf)
            inside = np.log(np.exp(top - top[:, :1]).sum(axis=1)) + largest
            total = np.logaddexp(inside, log_sum)
            floats[:, HEAD_WORDS - 1] = log_sum - total
            floats[:, -num_candidates:] = top - total[:, None]
        room.rows[part, HEAD_WORDS + 1 : HEAD_WORDS + 1 + num_candidates] = ids
        room.total[part] = total

    def rows(self) -> Copy:
        """The rows, now that their tokens are drawn."""
        tokens = self._drawn().numpy()
        rows = self._room.rows[: self._num_rows]
        # Of -1 the last token's: such rows are left out.
        own = self._room.copy[np.arange(self._num_rows), tokens]
        rows[:, HEAD_WORDS] = tokens
        own -= self._room.total[: self._num_rows]
        rows.view(np.float32)[:, -self._room.num_candidates - 1] = own
        return Copy(torch.from_numpy(rows), lambda: True)


@dataclass(frozen=True)
class DeviceStep:
    """A step on a GPU."""

    heads: NDArray[np.int32]
    ids: torch.Tensor  # [n, K]
    logits: torch.Tensor  # [n, K] falling
    copy: torch.Tensor  # [n, V] logits, of any value at the candidates
    log_sum: torch.Tensor  # [n] of the exponentials outside
    drawn: Callable[[], torch.Tensor]

    def rows(self) -> Copy:
        """The rows, now that their tokens are drawn."""
        tokens = self.drawn()
        total = torch.logaddexp(self.logits.logsumexp(1), self.log_sum)
        is_token = self.ids == tokens[:, None]
        own = self.copy.gather(1, tokens.clamp(min=0)[:, None])[:, 0]
        own = torch.where(is_token.any(1), self.logits.masked_fill(~is_token, 0).sum(1), own)
        num_rows, num_candidates = self.ids.shape
        rows = torch.empty(
            (num_rows, row_words(num_candidates)), dtype=torch.int32, device=self.ids.device
        )
        rows[:, : HEAD_WORDS - 1] = torch.from_numpy(self.heads)
        rows[:, HEAD_WORDS - 1] = (self.log_sum - total).view(torch.int32)
        rows[:, HEAD_WORDS] = tokens
        rows[:, HEAD_WORDS + 1 : HEAD_WORDS + 1 + num_candidates] = self.ids
        logprobs = torch.cat([own[:, None], self.logits], 1) - total[:, None]
        rows[:, HEAD_WORDS + 1 + num_candidates :] = logprobs.view(torch.int32)
        return _on_host(rows)


def _outside(
    logits: torch.Tensor, top: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of the logits, which the sampler changes in place, and their sum outside the ids."""
    if logits.is_cuda:
        from teacher_cache.engines.vllm.outside_triton import outside  # vLLM needs Triton there

        return outside(logits, top)
    copy = logits.scatter(1, ids, -torch.inf)
    return copy, copy.logsumexp(1)


def _on_host(rows: torch.Tensor) -> Copy:
    if not rows.is_cuda:
        return Copy(rows.cpu(), lambda: True)
    copy = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    copy.copy_(rows, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
    event.record()
    return Copy(copy, event.query)
