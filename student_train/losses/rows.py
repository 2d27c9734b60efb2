"""The row operation: a chunk's logits in, its losses and, in their place, their gradients out.

Dense work, once over all V columns, is in `TorchPasses`; everything else here works on the kept
entries and a few numbers per row. The student's tail is a log-sum-exp over the columns that are
not kept, never one minus the rest (which is noise as soon as the student is sure).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from student_train.losses.divergence import divergence_terms, teacher_logprobs
from student_train.losses.targets import TeacherTargets
from student_train.objective import Objective


@dataclass(frozen=True)
class TailSums:
    """Log-sum-exp over the columns that are not kept, split into peak and rest.

    Attributes:
        peak: [C] their largest logit; -inf where all are kept.
        rest: [C] log-sum-exp of (logit - peak).
        rest_tempered: [C] the same of (logit - peak) / temperature.
    """

    peak: Tensor
    rest: Tensor
    rest_tempered: Tensor


@dataclass(frozen=True)
class RowResults:
    """Per row [C]: divergence times T^2, cross entropy, student's kept mass, top-1 agreement."""

    kl: Tensor
    ce: Tensor
    student_mass: Tensor
    top1: Tensor

    def of(self, rows: slice) -> RowResults:
        """Those of some rows, in the same memory."""
        return RowResults(self.kl[rows], self.ce[rows], self.student_mass[rows], self.top1[rows])


@dataclass(frozen=True)
class RowGradients:
    """The gradient of a chunk's weighted loss by the head's outputs, short of the dense part.

    Attributes:
        tail: [C] factor of softmax(logits / temperature) over the columns that are not kept.
        tail_ce: [C] factor of softmax(logits) there, where the temperature is not 1.
        columns: [C, J] columns that differ: the kept ones, and the label if it is not kept; the
            dummy column where neither applies.
        values: [C, J] their gradients.
    """

    tail: Tensor
    tail_ce: Tensor
    columns: Tensor
    values: Tensor


class Passes(Protocol):
    """The two dense passes over a chunk, in place."""

    max_fused_kept: int  # kept entries up to which one kernel does all of a row, passes included

    def __init__(self, objective: Objective) -> None: ...

    @staticmethod
    def row_bytes(
        objective: Objective, width: int, dtype: torch.dtype, gradient_dtype: torch.dtype
    ) -> int:
        """Bytes of buffers per row of `width` columns: logits in `dtype`, gradients in theirs."""
        ...

    def transform_(self, logits_CV: Tensor) -> None:
        """Scale and cap the head's outputs."""
        ...

    def reduce_(self, logits_CV: Tensor) -> TailSums:
        """Sum over the columns that are not -inf."""
        ...

    def gradient_(self, logits_CV: Tensor, gradients: RowGradients, dtype: torch.dtype) -> Tensor:
        """Turn what `reduce_` left into the gradient by the head's outputs, in `dtype`."""
        ...


class TorchPasses:
    """The passes in PyTorch, on any device."""

    max_fused_kept = 0

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._softmax: Tensor | None = None
        self._slope: Tensor | None = None

    @staticmethod
    def row_bytes(
        objective: Objective, width: int, dtype: torch.dtype, gradient_dtype: torch.dtype
    ) -> int:
        """Bytes of buffers per row of `width` columns: logits in `dtype`, gradients in theirs."""
        num_buffers = 1 + (objective.temperature != 1) + (objective.softcap is not None)
        return width * (
            num_buffers * dtype.itemsize + (dtype != gradient_dtype) * gradient_dtype.itemsize
        )

    def transform_(self, logits_CV: Tensor) -> None:
        """Scale and cap the head's outputs."""
        cap_(self._objective, logits_CV)
        if self._objective.softcap is not None:
            ratio = logits_CV / self._objective.softcap
            self._slope = ratio.square_().neg_().add_(1)

    def reduce_(self, logits_CV: Tensor) -> TailSums:
        """Sum over the columns that are not -inf; leaves the softmax over them in place."""
        peak = logits_CV.amax(dim=1)
        rest: Tensor | None = None
        if self._objective.temperature != 1:
            self._softmax = torch.softmax(logits_CV, dim=1)
            rest = _log_sum(self._softmax, peak)
            logits_CV.div_(self._objective.temperature)
        torch.softmax(logits_CV, dim=1, out=logits_CV)
        rest_tempered = _log_sum(logits_CV, peak)
        return TailSums(peak, rest_tempered if rest is None else rest, rest_tempered)

    def gradient_(self, softmax_CV: Tensor, gradients: RowGradients, dtype: torch.dtype) -> Tensor:
        """Turn the result of `reduce_` into the gradient by the head's outputs, in `dtype`."""
        softmax_CV.mul_(gradients.tail[:, None])
        if self._softmax is not None:
            softmax_CV.addcmul_(self._softmax, gradients.tail_ce[:, None])
        if self._slope is not None:
            softmax_CV[:, : self._slope.shape[1]].mul_(self._slope)
        return softmax_CV.scatter_(1, gradients.columns, gradients.values).to(dtype)


def cap_(objective: Objective, logits_CV: Tensor) -> None:
    """Scale and cap a head's outputs, in place."""
    if objective.logit_scale != 1:
        logits_CV.mul_(objective.logit_scale)
    if objective.softcap is not None:
        logits_CV.div_(objective.softcap).tanh_().mul_(objective.softcap)


def _log_sum(softmax: Tensor, peak: Tensor) -> Tensor:
    """Log-sum-exp less the peak: the peak's own softmax is exp(peak - log-sum-exp)."""
    return torch.where(peak == -torch.inf, 0.0, -softmax.amax(dim=1).log())


@dataclass(frozen=True)
class Student:
    """The student's logits of kept ids and target token, and log-probabilities from them.

    Attributes:
        kept: [C, K] logits at the kept ids, -inf in padding.
        label: [C] logit at the target token.
        tail: The sums over all other columns.
    """

    kept: Tensor
    label: Tensor
    tail: TailSums

    def logprobs(self, rest: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """[C, J] log-probabilities at a temperature, and [C] those of the target token.

        All logits are taken relative to the row's largest, so that float32 resolves them.
        """
        top = torch.maximum(self.kept.amax(dim=1), self.tail.peak)
        kept = (self.kept - top[:, None]) / temperature
        tail_lse = (self.tail.peak - top) / temperature + rest
        kept_lse = kept.logsumexp(dim=1)
        kept_mass = logsigmoid(kept_lse - tail_lse)
        offset = kept_mass - kept_lse
        joint = [kept + offset[:, None], logsigmoid(tail_lse - kept_lse)[:, None]]
        return torch.cat(joint, dim=1), (self.label - top) / temperature + offset


def evaluate_rows(
    objective: Objective,
    targets: TeacherTargets,
    student: Student,
    num_vocab: int,
    row_weight: Tensor | None,
) -> tuple[RowResults, RowGradients | None]:
    """Losses and, for a [C] `row_weight`, the gradient of their weighted sum.

    With D's derivative g_j by log q_j and G = sum_j g_j, that by the logits z is g_i - q_i G at a
    kept id i, and exp(z_v - t) (g_T - q_T G) elsewhere, t the tail's log-sum-exp and T the tail's
    outcome. num_vocab is V and the index of the dummy column.
    """
    dtype, temperature = student.kept.dtype, objective.temperature
    log_p = teacher_logprobs(targets, objective, num_vocab, dtype)
    log_q1, label_logprob = student.logprobs(student.tail.rest, 1.0)
    log_q = log_q1
    if temperature != 1:
        log_q, _ = student.logprobs(student.tail.rest_tempered, temperature)
    value, by_log_q = divergence_terms(objective, log_p, log_q)
    if objective.tail == "zero":  # the terms of the sum include + q - p, here 1 - P altogether
        value = value + torch.expm1(log_p.logsumexp(dim=1))
    is_untaught = ~targets.has_distribution()
    results = RowResults(
        kl=(value * temperature**2).masked_fill(is_untaught, 0.0),
        ce=-label_logprob,
        student_mass=-torch.expm1(log_q1[:, -1]).masked_fill(is_untaught, 0.0),
        top1=_top1_agrees(targets, student) & ~is_untaught,
    )
    if row_weight is None:
        return results, None

    kl_grad = (by_log_q - log_q.exp() * by_log_q.sum(dim=1, keepdim=True)) * temperature
    is_label = targets.label_column()
    q1 = log_q1.exp()
    # Minus all others, since q - 1 would lose the gradient of a label that is nearly certain.
    others = torch.cat([q1[:, :-1].masked_fill(is_label, 0.0), q1[:, -1:]], dim=1)
    ce_grad = others.clone()
    ce_grad[:, :-1].sub_(is_label * others.sum(dim=1, keepdim=True))
    kl_grad = kl_grad * (row_weight * (1 - objective.ce_weight))[:, None]
    kl_grad = kl_grad.masked_fill(is_untaught[:, None], 0.0)
    ce_grad = ce_grad * (row_weight * objective.ce_weight)[:, None]
    return results, _assemble(objective, targets, student, num_vocab, kl_grad, ce_grad, row_weight)


def _assemble(
    objective: Objective,
    targets: TeacherTargets,
    student: Student,
    num_vocab: int,
    kl_grad: Tensor,
    ce_grad: Tensor,
    row_weight: Tensor,
) -> RowGradients:
    """Gradients by outcome [C, J] to gradients by column, through softcap and scale."""
    kept, tail = targets.kept(), student.tail
    label_kept = targets.label_column().any(dim=1)
    distance = student.label - tail.peak
    label_grad = (
        kl_grad[:, -1] * (distance / objective.temperature - tail.rest_tempered).exp()
        + ce_grad[:, -1] * (distance - tail.rest).exp()
        - row_weight * objective.ce_weight
    )
    values = torch.cat([(kl_grad + ce_grad)[:, :-1], label_grad[:, None]], dim=1)
    if objective.softcap is not None:
        logits = torch.cat([student.kept, student.label[:, None]], dim=1)
        values = values * (1 - (logits / objective.softcap) ** 2)
    columns = torch.cat(
        [
            targets.top_ids.masked_fill(~kept, num_vocab),
            targets.target_ids.masked_fill(label_kept, num_vocab)[:, None],
        ],
        dim=1,
    ).long()
    scale = objective.logit_scale
    one_factor = objective.temperature == 1
    return RowGradients(
        tail=(kl_grad[:, -1] + ce_grad[:, -1] if one_factor else kl_grad[:, -1]) * scale,
        tail_ce=ce_grad[:, -1] * scale,
        columns=columns,
        values=values * scale,
    )


def _top1_agrees(targets: TeacherTargets, student: Student) -> Tensor:
    """[C] bool: every other token is less likely under the student than the teacher's likeliest.

    A tie is not agreement: an untrained student finds all tokens equally likely. Among the
    teacher's ties, which its rounded logits have, the first entry counts.
    """
    likeliest = targets.top_logits.masked_fill(~targets.kept(), -torch.inf).argmax(dim=1)[:, None]
    logit = student.kept.gather(1, likeliest)[:, 0]
    others = student.kept.scatter(1, likeliest, -torch.inf).amax(dim=1)
    return logit > torch.maximum(others, student.tail.peak)
