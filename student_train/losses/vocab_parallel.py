"""A head whose vocabulary is split over processes: their communication about a chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from student_train.losses.rows import Student, TailSums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class VocabShard:
    """This process' part of the head's vocabulary.

    Every process of the group calls the loss with its own rows of the weight (and entries of the
    bias), and with the same hidden states, targets (in ids of the whole vocabulary) and token
    weights. Each gets the whole loss, the whole gradient of the hidden states, and the gradient of
    its own rows. The parts must not overlap and must together be the vocabulary.

    Attributes:
        group: The processes that share the head.
        start: First id of this process.
        num_vocab: V of the whole head.
    """

    group: ProcessGroup
    start: int
    num_vocab: int

    @property
    def even_share(self) -> int:
        """Ids per process if all have about as many; the same number on all of them."""
        return -(-self.num_vocab // self.group.size())

    def local_columns(self, ids: Tensor, num_local: int) -> Tensor:
        """Columns in this process' part; `num_local`, one past its last column, for other ids."""
        columns = ids - self.start
        return columns.masked_fill((columns < 0) | (columns >= num_local), num_local)

    def merge(self, local: Student, temperature: float) -> Student:
        """The student over all processes: two all-reduces of K + 4 numbers per row in all."""
        largest = torch.cat([local.kept, local.label[:, None], local.tail.peak[:, None]], dim=1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        kept, label, peak = largest[:, :-2], largest[:, -2], largest[:, -1]
        sums = _sums_below(local.tail, peak, temperature).exp()
        dist.all_reduce(sums, dist.ReduceOp.SUM, group=self.group)
        rest, rest_tempered = sums.log().masked_fill(peak == -torch.inf, 0.0).unbind(0)
        return Student(kept, label, TailSums(peak, rest, rest_tempered))

    def tail_shares(self, local: TailSums, merged: TailSums, temperature: float) -> Tensor:
        """[2, C] local share of the tail's mass, at temperature 1 and the given one."""
        totals = torch.stack([merged.rest, merged.rest_tempered])
        return (_sums_below(local, merged.peak, temperature) - totals).exp()

    def sum_gradients(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum of every process' gradient of the hidden states, summed in `dtype`."""
        total = gradient.to(dtype)
        dist.all_reduce(total, dist.ReduceOp.SUM, group=self.group)
        return total.to(gradient.dtype)


def _sums_below(local: TailSums, peak: Tensor, temperature: float) -> Tensor:
    """[2, C] log-sum-exps of local columns, relative to a peak over all processes."""
    below = torch.where(local.peak == -torch.inf, -torch.inf, local.peak - peak)
    return torch.stack([below + local.rest, below / temperature + local.rest_tempered])
