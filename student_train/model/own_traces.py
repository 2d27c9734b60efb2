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
    sparse_kl_of_two,
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
        if self.ratio_clip is None:
            divergence = replace(objective, ce_weight=0.0)
            result = sparse_kl_of_two(
                hidden_ND, weight_VD, batch.targets, batch.token_weight, (objective, divergence),
                is_own_N, bias=bias,
            )  # fmt: skip
            loss, is_clipped_N = result.loss, torch.zeros_like(is_own_N)
        else:
            label_alone = replace(objective, ce_weight=1.0)
            sampled = _sampled(
                hidden_ND, weight_VD, bias, batch, label_alone, is_own_N, self.ratio_clip
            )
            result = sparse_kl_of_two(
                hidden_ND, weight_VD, batch.targets, sampled.slope_N, (objective, label_alone),
                is_own_N, bias=bias,
            )  # fmt: skip
            loss, is_clipped_N = result.loss + sampled.beyond_slope, sampled.is_clipped_N
        stale_N = staleness(result.ce, batch.rollout_logprob.to(result.ce.dtype))
        sums = [torch.where(is_own_N, stale_N, 0.0), is_clipped_N, is_own_N]
        return loss, result, torch.stack([each.double().sum() for each in sums])


@dataclass(frozen=True)
class _Sampled:
    """The policy gradient as weights of cross entropies, which have the same gradient.

    Attributes:
        slope_N: [N] derivative of the loss by each token's cross entropy; the token's weight in the
            loss where the student did not sample it.
        beyond_slope: [] what the loss is more than the cross entropies with these weights.
        is_clipped_N: [N] bool.
    """

    slope_N: Tensor
    beyond_slope: Tensor
    is_clipped_N: Tensor


@torch.no_grad()
def _sampled(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias: Tensor | None,
    batch: MicroBatch,
    label_alone: Objective,
    is_own_N: Tensor,
    ratio_clip: float,
) -> _Sampled:
    """One more product with the head: the slope has to be known before gradients are formed."""
    rows = is_own_N.nonzero()[:, 0]
    targets = batch.targets.select(rows)
    hidden_RD = hidden_ND.index_select(0, rows)
    nll_R = sparse_kl_per_token(hidden_RD, weight_VD, targets, label_alone, bias=bias).ce
    weight_R = batch.token_weight[rows].to(nll_R.dtype)
    with torch.enable_grad():
        sampled = sampled_token_loss(
            nll_R.requires_grad_(),
            batch.rollout_logprob[rows].to(nll_R.dtype),
            teacher_logprob_of_labels(targets).to(nll_R.dtype),
            ratio_clip=ratio_clip,
        )
        loss = (sampled.loss * weight_R).sum()
        (slope_R,) = torch.autograd.grad(loss, nll_R)
    return _Sampled(
        batch.token_weight.to(nll_R.dtype).index_copy(0, rows, slope_R),
        (loss - (slope_R * nll_R).sum()).detach(),
        torch.zeros_like(is_own_N).index_copy(0, rows, sampled.is_clipped),
    )
