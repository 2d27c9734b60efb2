"""The one-sample estimator of the reverse KL: a policy gradient on tokens that the student sampled.

Of every token one number of the teacher's is used, its logprob. It is the objective of offline
on-policy distillation (Lightning OPD, arXiv 2604.13010) and the baseline for whole distributions.

Letters: N tokens that the student sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from student_train.losses.targets import TeacherTargets


@dataclass(frozen=True)
class SampledTokenLoss:
    """The loss of each token, and what it says of the student's distance from its rollout.

    Attributes:
        loss: [N] with its gradient.
        is_clipped: [N] bool, True where the clip holds the token's gradient back.
    """

    loss: Tensor
    is_clipped: Tensor


def sampled_token_loss(
    nll_N: Tensor, rollout_logprob_N: Tensor, teacher_logprob_N: Tensor, *, ratio_clip: float
) -> SampledTokenLoss:
    """Policy-gradient loss of tokens that an earlier state of the student sampled.

        loss = -min(r A, clip(r, 1 - ratio_clip, 1 + ratio_clip) A)
        A = log p_teacher - log q, a constant,  r = q / q_rollout

    Without the clip the mean gradient over the rollout's samples is that of KL(q, p_teacher), for
    today's student q and whatever the rollout's was: -r A grad log q, weighted by q_rollout, is
    (log q - log p_teacher) grad q. An advantage over q_rollout instead would agree with it at r = 1
    alone, and afterwards go on past the teacher, towards the one token with the largest. The clip
    of Schulman et al. (arXiv 1707.06347) bounds what one token moves.

    Args:
        nll_N: [N] -log q of each token under the student, with its gradient, nats.
        rollout_logprob_N: [N] log q_rollout, of the student when it sampled the token.
        teacher_logprob_N: [N] log p_teacher, at temperature 1.
        ratio_clip: Largest change of r from 1 that still has a gradient; above 0.
    """
    advantage_N = (teacher_logprob_N + nll_N).detach()
    ratio_N = torch.exp(-nll_N - rollout_logprob_N)
    clipped_N = ratio_N.clamp(1 - ratio_clip, 1 + ratio_clip)
    free, held = -ratio_N * advantage_N, -clipped_N * advantage_N
    return SampledTokenLoss(torch.maximum(free, held), (held > free).detach())


def teacher_logprob_of_labels(targets: TeacherTargets) -> Tensor:
    """[N] the teacher's logprob of each target token, nats; -inf where it is not among the kept."""
    logits = torch.where(targets.kept(), targets.top_logits, -torch.inf)
    label = torch.where(targets.label_column(), targets.top_logits, -torch.inf).amax(dim=1)
    inside = torch.nn.functional.logsigmoid(-targets.tail_logit)
    return label - logits.logsumexp(dim=1) + inside


@torch.no_grad()
def staleness(nll_N: Tensor, rollout_logprob_N: Tensor) -> Tensor:
    """[N] unbiased and non-negative estimates of KL(rollout's student, today's), nats.

    r - 1 - log r, with r = q / q_rollout, of tokens sampled from q_rollout; 0 where nothing has
    changed.
    """
    log_ratio_N = -nll_N - rollout_logprob_N
    return torch.expm1(log_ratio_N) - log_ratio_N
