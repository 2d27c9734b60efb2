"""The teacher's side of the loss: kept ids and logits, tail, target token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's distribution over N tokens, as a cache stores it.

    Only shapes, dtypes and devices are checked. Values are trusted, since reading them back would
    stall a GPU: the code that builds the batch must ensure that ids are distinct within a row and
    in [0, V), and that k <= K.

    Attributes:
        top_ids: [N, K] int64 or int32; the first k[n] columns of row n are real. A row without a
            distribution (k[n] = 0) has its target token in the first.
        top_logits: [N, K] float32 or float64, relative to the row's largest, in nats; ignored
            beyond k[n], but finite.
        k: [N] integer, kept entries per row; 0 where there is no distribution: the divergence and
            its gradient are 0 there, and the cross entropy teaches alone.
        tail_logit: [N] float32 or float64, log(tail / (1 - tail)) of the teacher's probability
            mass outside the kept entries; ignored where k[n] = V.
        target_ids: [N] int64 or int32, the tokens that the trace holds: the labels of the cross
            entropy. They need not be among the kept ids.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """

    top_ids: Tensor
    top_logits: Tensor
    k: Tensor
    tail_logit: Tensor
    target_ids: Tensor

    def __post_init__(self) -> None:
        if self.top_ids.dim() != 2 or self.top_ids.shape[1] < 1:
            raise ValueError(
                f"top_ids: expected [N, K] with K >= 1, got {list(self.top_ids.shape)}"
            )
        num_rows, num_kept = self.top_ids.shape
        floats, ids = (torch.float32, torch.float64), (torch.int32, torch.int64)
        for name, shape, dtypes in (
            ("top_ids", (num_rows, num_kept), ids),
            ("top_logits", (num_rows, num_kept), floats),
            ("k", (num_rows,), _INTEGERS),
            ("tail_logit", (num_rows,), floats),
            ("target_ids", (num_rows,), ids),
        ):
            value: Tensor = getattr(self, name)
            if value.shape != shape:
                raise ValueError(f"{name}: expected {list(shape)}, got {list(value.shape)}")
            if value.dtype not in dtypes:
                expected = " or ".join(str(dtype) for dtype in dtypes)
                raise ValueError(f"{name}: expected {expected}, got {value.dtype}")
            if value.device != self.top_ids.device:
                raise ValueError(
                    f"{name} is on {value.device} but top_ids on {self.top_ids.device}: "
                    "move all of them to the student's device"
                )

    def __len__(self) -> int:
        """Number of rows N."""
        return self.top_ids.shape[0]

    def select(self, rows: slice | Tensor) -> TeacherTargets:
        """The targets of some rows, by slice or index tensor."""
        return TeacherTargets(
            top_ids=self.top_ids[rows],
            top_logits=self.top_logits[rows],
            k=self.k[rows],
            tail_logit=self.tail_logit[rows],
            target_ids=self.target_ids[rows],
        )

    def kept(self) -> Tensor:
        """[N, K] bool, True where a column is real; the first always is."""
        columns = torch.arange(self.top_ids.shape[1], device=self.top_ids.device)
        return columns < self.k.clamp(min=1)[:, None]

    def has_distribution(self) -> Tensor:
        """[N] bool."""
        return self.k > 0

    def label_column(self) -> Tensor:
        """[N, K] bool, True where a column is the target token; nowhere if it is not kept."""
        return self.kept() & (self.top_ids == self.target_ids[:, None])
