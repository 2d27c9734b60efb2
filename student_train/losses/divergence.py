"""Which objectives there are, and their value and gradient over the kept entries and the tail."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from student_train.losses.targets import TeacherTargets

# The default of `mix` for the divergences that have one.
_MIXES = {"combined_kl": 0.5, "jsd": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.1}
DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "combined_kl",
    "jsd",
    "skew_kl",
    "skew_reverse_kl",
    "tvd",
)
TAILS = ("bucket", "renormalise", "zero")


@dataclass(frozen=True)
class Objective:
    """What is minimised per token: (1 - ce_weight) T^2 D(p, q) + ce_weight CE.

    p is the teacher, q the student, T the temperature, and D one of:

    | divergence | D | mix x |
    | --- | --- | --- |
    | forward_kl | KL(p, q) | |
    | reverse_kl | KL(q, p) | |
    | combined_kl | x KL(p, q) + (1 - x) KL(q, p) | 0.5 |
    | jsd | x KL(p, m) + (1 - x) KL(q, m), m = x p + (1 - x) q | 0.5 |
    | skew_kl | KL(p, x p + (1 - x) q) | 0.1 |
    | skew_reverse_kl | KL(q, x q + (1 - x) p) | 0.1 |
    | tvd | sum of abs(p - q) / 2 | |

    jsd is that of Agarwal et al. (arXiv 2306.13649), the skew divergences those of Ko et al.
    (arXiv 2402.03898).

    What lies outside the kept entries is, by `tail`:

    - bucket: one more outcome of both, with the stored mass and the student's mass there. A lower
      bound of the divergence over the whole vocabulary (data-processing inequality).
    - renormalise: impossible under the teacher, whose kept entries are renormalised to sum to one;
      the student keeps its whole vocabulary.
    - zero: left out of the sum, sum_i p_i log(p_i / q_i) over the kept entries with their stored
      probabilities. P (KL + log P), KL that of renormalise and P the teacher's kept mass.

    Attributes:
        divergence: One of `DIVERGENCES`.
        mix: x above, in (0, 1); None for its default, and for divergences without one.
        tail: One of `TAILS`.
        temperature: T; both distributions are raised to 1 / T and the divergence multiplied by T^2
            (Hinton et al., arXiv 1503.02531). The cross entropy stays at 1.
        ce_weight: In [0, 1]: 0 is the divergence alone, 1 the cross entropy alone. The default is
            that of arXiv 2512.21002, and of `train-student run`.
        softcap: Logits x become softcap * tanh(x / softcap), after scaling; None for no cap.
        logit_scale: The head's outputs are multiplied by it, before the cap.

    Raises:
        ValueError: If a value is out of range, or the combination is no divergence or cannot be
            determined from what a cache stores.
    """

    divergence: str = "forward_kl"
    mix: float | None = None
    tail: str = "bucket"
    temperature: float = 1.0
    ce_weight: float = 0.5
    softcap: float | None = None
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        self._check_ranges()
        if self.temperature != 1 and self.tail != "renormalise":
            raise ValueError(
                f"temperature {self.temperature} with tail={self.tail!r}: a cache holds the tail's "
                "mass at temperature 1 only, and what it would be at another depends on how it is "
                "spread. Use temperature=1 or tail='renormalise'"
            )
        if self.tail == "renormalise" and self.divergence in ("reverse_kl", "combined_kl"):
            raise ValueError(
                f"{self.divergence} with tail='renormalise' is infinite: the student's mass "
                "outside the kept entries meets no mass of the teacher. Use tail='bucket'"
            )
        if self.tail == "zero" and self.divergence != "forward_kl":
            raise ValueError(
                f"{self.divergence} with tail='zero' is no divergence: the teacher's kept entries "
                "sum to less than one, so its minimum is not at the teacher. Use tail='bucket'"
            )

    def _check_ranges(self) -> None:
        if self.divergence not in DIVERGENCES:
            names = ", ".join(DIVERGENCES)
            raise ValueError(f"divergence: expected one of {names}, got {self.divergence!r}")
        if self.tail not in TAILS:
            raise ValueError(f"tail: expected one of {', '.join(TAILS)}, got {self.tail!r}")
        if self.mix is not None and self.divergence not in _MIXES:
            raise ValueError(f"mix: {self.divergence} has none, got {self.mix}")
        if self.mix is not None and not 0 < self.mix < 1:
            raise ValueError(
                f"mix: expected 0 < mix < 1, got {self.mix}; "
                "for the ends use divergence='forward_kl' or 'reverse_kl'"
            )
        if not 0 <= self.ce_weight <= 1:
            raise ValueError(f"ce_weight: expected a share in [0, 1], got {self.ce_weight}")
        for name in ("temperature", "softcap"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if not math.isfinite(self.logit_scale):
            raise ValueError(f"logit_scale: expected a finite number, got {self.logit_scale}")


DEFAULT_OBJECTIVE = Objective()


def teacher_logprobs(
    targets: TeacherTargets, objective: Objective, num_vocab: int, dtype: torch.dtype
) -> Tensor:
    """The teacher's log-probabilities over the kept entries and the tail, [N, J].

    Padding, and a tail that the objective or a row with k = V has not, are -inf.
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
        objective: Which divergence; its tail and temperature are already in log_p and log_q.
        log_p: [N, J] the teacher; -inf where an outcome has no mass.
        log_q: [N, J] the student, summing to one; -inf where log_p is too, or in a tail.

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
        x = _MIXES.get(name, 0.0)
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
