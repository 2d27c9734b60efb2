"""Values and gradients of the divergences over the kept entries and the tail."""

from __future__ import annotations

import torch
from torch import Tensor

from student_train.losses.targets import TeacherTargets
from student_train.objective import DEFAULT_MIXES, Objective


def teacher_logprobs(
    targets: TeacherTargets, objective: Objective, num_vocab: int, dtype: torch.dtype
) -> Tensor:
    """The teacher's log-probabilities over the kept entries and the tail, [N, J].

    Padding is -inf, as is the tail where the objective or a row with k = V has none.
    """
    top_logits = targets.top_logits.to(dtype) / objective.temperature
    top_logits = top_logits.masked_fill(~targets.kept(), -torch.inf)
    kept_logprobs = torch.log_softmax(top_logits, dim=1)
    tail_logit = targets.tail_logit.to(dtype).masked_fill(targets.k >= num_vocab, -torch.inf)
    tail_logprob = torch.nn.functional.logsigmoid(tail_logit)
    if objective.tail != "renormalise":
        kept_logprobs = kept_logprobs + torch.nn.functional.logsigmoid(-tail_logit)[:, None]
    if objective.tail != "bucket":
        tail_logprob = torch.full_like(tail_logprob, -torch.inf)
    return torch.cat([kept_logprobs, tail_logprob[:, None]], dim=1)


def divergence_terms(objective: Objective, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Value of the divergence per row and its derivative by log q per outcome.

    Each value is a sum over outcomes of non-negative terms, such as p log(p / q) - p + q, that
    vanish to second order where p = q: the added parts sum to zero over a row, and with them
    rounding does not drown a small divergence. All outcomes are expressed in the difference
    log q - log p for the same reason.

    Args:
        objective: Names the divergence; its tail and temperature are already in log_p and log_q.
        log_p: [N, J] the teacher's; -inf where an outcome has no mass.
        log_q: [N, J] the student's, summing to one; -inf where log_p is too, or in a tail.

    Returns:
        [N] values, and [N, J] derivatives by log q, of q taken as independent per outcome.
    """
    p, q = log_p.exp(), log_q.exp()
    # Both are -inf in padding, where the difference must be 0; NaN must stay NaN.
    d = torch.where(log_p == log_q, 0.0, log_q - log_p)
    excess = torch.where(d > 1, q - p, p * torch.expm1(d.clamp(max=1)))  # q - p
    p_d, q_d = _times(p, d), _times(q, d)
    name, x = objective.divergence, objective.mix
    if x is None:
        x = DEFAULT_MIXES.get(name, 0.0)
    if name == "forward_kl":
        terms, by_log_q = excess - p_d, excess
    elif name == "reverse_kl":
        terms, by_log_q = q_d - excess, q_d
    elif name == "combined_kl":
        terms = x * (excess - p_d) + (1 - x) * (q_d - excess)
        by_log_q = x * excess + (1 - x) * q_d
    elif name == "jsd":
        log_p_m, log_q_m = _log_ratios_to_mixture(d, 1 - x)
        terms = x * _times(p, log_p_m) + (1 - x) * _times(q, log_q_m)
        by_log_q = (1 - x) * _times(q, log_q_m)
    elif name == "skew_kl":
        log_p_m, _ = _log_ratios_to_mixture(d, 1 - x)
        terms = _times(p, log_p_m) + (1 - x) * excess
        by_log_q = -(1 - x) * q * torch.expm1(log_p_m)
    elif name == "skew_reverse_kl":
        _, log_q_m = _log_ratios_to_mixture(d, x)
        terms = _times(q, log_q_m) - (1 - x) * excess
        by_log_q = q * (log_q_m - x * torch.expm1(log_q_m))
    else:
        terms, by_log_q = excess.abs() / 2, q * excess.sign() / 2
    return terms.sum(dim=1), by_log_q


def _times(mass: Tensor, log_ratio: Tensor) -> Tensor:
    """The product, 0 where there is no mass."""
    return torch.where(mass == 0, 0.0, mass * log_ratio)


def _log_ratios_to_mixture(d: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """log(p / m) and log(q / m) of m = (1 - share) p + share q, from d = log(q / p)."""
    from_p = torch.log1p(share * torch.expm1(d.clamp(max=0)))  # log(m / p) where d <= 0
    from_q = torch.log1p((1 - share) * torch.expm1(-d.clamp(min=0)))  # log(m / q) where d > 0
    return torch.where(d > 0, -from_q - d, -from_p), torch.where(d > 0, -from_q, d - from_p)
