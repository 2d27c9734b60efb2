"""Loss of a micro-batch in which the student sampled some of the tokens itself.

Letters: N loss tokens, D hidden size, V vocabulary.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from student_train.batch.micro_batch import MicroBatch
from student_train.losses import (
    Objective,
    SparseKLOutput,
    sampled_token_loss,
    sparse_kl,
    sparse_kl_per_token,
    staleness,
    teacher_logprob_of_labels,
)

# Sums over the tokens that the student sampled: estimates of KL(rollout's student, today's), how
# many gradients are clipped, and how many such tokens there are.
OWN_SUMS = ("staleness", "clipped_share", "own_tokens")


@dataclass(frozen=True)
class OwnTraces:
    """How tokens of the student's own are learned from.

    Attributes:
        ratio_clip: Bound of the policy gradient on them, see `sampled_token_loss`; None for the
            objective's divergence, as for all other tokens.
    """

    ratio_clip: float | None

    def loss(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias: Tensor | None,
        batch: MicroBatch,
        objective: Objective,
    ) -> tuple[Tensor, SparseKLOutput, Tensor]:
        """The weighted sum over the loss tokens; arguments are those of `sparse_kl`.

        Own tokens have no cross entropy: their labels are the student's own words, of which the
        teacher has not said that they are right.

        Returns:
            The loss [], its detached parts [N] as of `sparse_kl`, and the `OWN_SUMS`, float64.
        """
        is_own_N = ~batch.rollout_logprob.isnan()
        given = sparse_kl(
            hidden_ND, weight_VD, batch.targets, batch.token_weight * ~is_own_N, objective,
            bias=bias,
        )  # fmt: skip
        is_clipped_N = torch.zeros_like(is_own_N)
        if self.ratio_clip is None:
            own = sparse_kl(
                hidden_ND, weight_VD, batch.targets, batch.token_weight * is_own_N,
                replace(objective, ce_weight=0.0), bias=bias,
            )  # fmt: skip
            own_loss, parts = own.loss, own
        else:
            rows = is_own_N.nonzero()[:, 0]
            targets = batch.targets.select(rows)
            own = sparse_kl_per_token(
                hidden_ND.index_select(0, rows), weight_VD, targets,
                replace(objective, ce_weight=1.0), bias=bias,
            )  # fmt: skip
            sampled = sampled_token_loss(
                own.loss,
                batch.rollout_logprob[rows].to(own.loss.dtype),
                teacher_logprob_of_labels(targets).to(own.loss.dtype),
                ratio_clip=self.ratio_clip,
            )
            own_loss = (sampled.loss * batch.token_weight[rows]).sum()
            is_clipped_N[rows] = sampled.is_clipped
            parts = _spread(own, rows, len(batch.targets))
        stale_N = staleness(parts.ce, batch.rollout_logprob.to(parts.ce.dtype))
        sums = [torch.where(is_own_N, stale_N, 0.0), is_clipped_N, is_own_N]
        joined = SparseKLOutput(
            loss=given.loss + own_loss,
            kl=given.kl + parts.kl,
            ce=given.ce + parts.ce,
            student_mass=given.student_mass + parts.student_mass,
            teacher_mass=given.teacher_mass,  # of all tokens, whatever their weight
            top1=given.top1 | parts.top1,
        )
        return joined.loss, joined, torch.stack([each.double().sum() for each in sums])


def _spread(output: SparseKLOutput, rows: Tensor, num_tokens: int) -> SparseKLOutput:
    """The parts of some tokens at their places among all, with zeros elsewhere."""
    parts = {
        name: getattr(output, name)
        .new_zeros(num_tokens)
        .index_copy(0, rows, getattr(output, name).detach())
        for name in ("kl", "ce", "student_mass", "teacher_mass", "top1")
    }
    return SparseKLOutput(loss=output.loss, **parts)
