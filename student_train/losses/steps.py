"""The row operation in steps: passes over the logits, and PyTorch between them.

On any device, and for a vocabulary that is split over processes, which speak to each other
between the passes.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, inf

from student_train.losses.head import HeadProducts
from student_train.losses.rows import Passes, RowResults, Student, evaluate_rows
from student_train.losses.targets import TeacherTargets
from student_train.losses.vocab_parallel import VocabShard
from student_train.objective import Objective

# A cache keeps at most 254 entries, whose buffers are small beside the logits; a live teacher
# keeps the whole vocabulary.
_MANY_KEPT = 1024
_BUFFERS_PER_ENTRY = 24  # ids of 8 bytes, and what exists at once of log p, log q, terms, masks


class RowSteps:
    """The rows of one call; a chunk's gradient takes the place of its logits.

    Attributes:
        chunks_per_product: Chunks whose gradients are multiplied together.
    """

    chunks_per_product = 1

    def __init__(
        self,
        objective: Objective,
        targets: TeacherTargets,
        head: HeadProducts,
        row_weight_N: Tensor | None,
        shard: VocabShard | None,
        passes_cls: type[Passes],
    ) -> None:
        """Take what all chunks share; without `row_weight_N` there are no gradients."""
        self._objective = objective
        self._targets = targets
        self._head = head
        self._row_weight_N = row_weight_N
        self._shard = shard
        self._passes_cls = passes_cls

    def row_bytes(self, width: int) -> int:
        """Bytes of buffers per row of a chunk, those per kept entry included where they count."""
        head, num_kept = self._head, self._targets.top_ids.shape[1]
        dense = self._passes_cls.row_bytes(
            self._objective, width, head.result_dtype, head.operand_dtype
        )
        if num_kept < _MANY_KEPT:
            return dense
        return dense + num_kept * _BUFFERS_PER_ENTRY * head.result_dtype.itemsize

    def __call__(
        self, first: int, start: int, logits_CV: Tensor, results: RowResults
    ) -> Tensor | None:
        """Evaluate a chunk.

        Args:
            first: First row of the chunks that are multiplied together.
            start: First row of this one.
            logits_CV: The head's products with hidden states; overwritten.
            results: [N] of all rows; those of this chunk are written.

        Returns:
            The gradient by the head's outputs, of the rows from `first` to the last of this chunk;
            None where none is wanted.
        """
        objective, shard, num_local = self._objective, self._shard, self._head.num_vocab
        num_vocab = num_local if shard is None else shard.num_vocab
        rows = slice(start, start + len(logits_CV))
        targets, row_weight = self._targets.select(rows), self._row_weight_N
        passes = self._passes_cls(objective)
        if self._head.bias_V is not None:
            logits_CV[:, :num_local].add_(self._head.bias_V)
        passes.transform_(logits_CV[:, :num_local])
        logits_CV[:, num_local:] = -inf
        kept_ids = targets.top_ids.masked_fill(~targets.kept(), num_vocab).long()
        label_ids = targets.target_ids.long()[:, None]
        if shard is not None:
            kept_ids = shard.local_columns(kept_ids, num_local)
            label_ids = shard.local_columns(label_ids, num_local)
        kept, label = logits_CV.gather(1, kept_ids), logits_CV.gather(1, label_ids)[:, 0]
        logits_CV.scatter_(1, kept_ids, -inf)
        student = local = Student(kept, label, passes.reduce_(logits_CV))
        if shard is not None:
            student = shard.merge(local, objective.temperature)
        part, gradients = evaluate_rows(
            objective, targets, student, num_vocab, None if row_weight is None else row_weight[rows]
        )
        for name in ("kl", "ce", "student_mass", "top1"):
            getattr(results, name)[rows] = getattr(part, name)
        if gradients is None:
            return None
        if shard is not None:
            shares = shard.tail_shares(local.tail, student.tail, objective.temperature)
            gradients = replace(
                gradients,
                tail=gradients.tail * shares[1],
                tail_ce=gradients.tail_ce * shares[0],
                columns=shard.local_columns(gradients.columns, num_local),
            )
        return passes.gradient_(logits_CV, gradients, self._head.operand_dtype)
