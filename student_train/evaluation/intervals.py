"""Intervals of 95 %: one kind, for shares of right answers and for figures computed from them.

Letters: S seeds, P prompts.

Answers to one prompt are alike, and so are answers of one run. Over runs with S seeds that answered
the same P prompts, the mean of x_sp has the variance of two crossed samples,

    V = (M_seed + M_prompt - M_rest) / (S P),

M being the mean squares of the two-way layout without interaction (Searle, Casella and McCulloch
1992, Variance Components, chapter 4). Quantiles are Student's, with the degrees of freedom of the
seeds' part of V (Satterthwaite 1946); with one seed they are the normal ones, and the interval
covers the prompts alone. A difference between two students is the mean of x_sp - y_sp: the same
prompts and the same seeds, so that difficulty common to both cancels.

A share has the score interval (Wilson 1927) at P / D prompts, where D = V / (p (1 - p) / (P - 1))
says how much wider V is than that of P independent answers. With one answer per prompt D is 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
_MANY = 1e6  # degrees of freedom that are as good as infinite


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and prompts, and the parts of its variance."""

    value: float
    num_seeds: int
    num_prompts: int
    seed_variance: float  # of one seed's mean, prompts being the same
    prompt_variance: float  # of one prompt's mean, seeds being the same
    rest_variance: float  # of one answer
    variance: float  # of the mean
    degrees: float  # of freedom

    @classmethod
    def of(cls, values_SP: NDArray[np.float64]) -> "Mean":
        """Estimate from [S, P]; with one prompt, or one seed, the other's part alone."""
        num_seeds, num_prompts = values_SP.shape
        mean = float(values_SP.mean())
        by_seed = values_SP.mean(axis=1) - mean
        by_prompt = values_SP.mean(axis=0) - mean
        rest = values_SP - mean - by_seed[:, None] - by_prompt[None, :]
        seed_square = num_prompts * _mean_square(by_seed, num_seeds - 1)
        prompt_square = num_seeds * _mean_square(by_prompt, num_prompts - 1)
        rest_square = _mean_square(rest, (num_seeds - 1) * (num_prompts - 1))
        # At least what either part alone gives: with few seeds the difference may be negative.
        total = max(seed_square + prompt_square - rest_square, seed_square, prompt_square)
        degrees = math.inf
        if seed_square > 0:
            degrees = (num_seeds - 1) * (total / seed_square) ** 2
        return cls(
            mean,
            num_seeds,
            num_prompts,
            max(0.0, seed_square - rest_square) / num_prompts,
            max(0.0, prompt_square - rest_square) / num_seeds,
            rest_square,
            total / (num_seeds * num_prompts),
            degrees,
        )

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95 %."""
        spread = t_quantile((1 + LEVEL) / 2, self.degrees) * math.sqrt(self.variance)
        return self.value - spread, self.value + spread

    @property
    def p_value(self) -> float:
        """Two-sided p-value of the mean being zero."""
        if self.variance == 0:
            return 1.0 if self.value == 0 else 0.0
        return 2 * t_tail(abs(self.value) / math.sqrt(self.variance), self.degrees)


def share_interval(values_SP: NDArray[np.float64]) -> tuple[float, float]:
    """Interval of 95 % for the share of right answers, from [S, P] shares of each prompt."""
    mean = Mean.of(values_SP)
    share, num_prompts = mean.value, mean.num_prompts
    size = float(num_prompts)
    if 0 < share < 1 and mean.variance > 0:
        size = share * (1 - share) / mean.variance
        if num_prompts > 1:
            size *= num_prompts / (num_prompts - 1)
    return wilson_interval(share, size, t_quantile((1 + LEVEL) / 2, mean.degrees))


def clustered_interval(num_right: Sequence[int], num_samples: int) -> tuple[float, float]:
    """Interval of 95 % for avg@n of one model, clustered by prompt (Miller 2024, 2411.00640).

    Args:
        num_right: [P] number of right samples of each prompt.
        num_samples: n, samples of every prompt.
    """
    return share_interval(np.asarray(num_right, np.float64)[None, :] / num_samples)


def wilson_interval(
    share: float, num_all: float, quantile: float = NormalDist().inv_cdf((1 + LEVEL) / 2)
) -> tuple[float, float]:
    """Score interval for a proportion (Wilson 1927).

        (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)

    Args:
        share: p, the proportion.
        num_all: n, number of trials; need not be whole.
        quantile: z, the normal or Student quantile.
    """
    z2 = quantile**2
    centre = share + z2 / (2 * num_all)
    spread = quantile * math.sqrt(share * (1 - share) / num_all + z2 / (4 * num_all**2))
    scale = 1 + z2 / num_all
    low = (centre - spread) / scale if share > 0 else 0.0  # exactly, where rounding says about
    high = (centre + spread) / scale if share < 1 else 1.0
    return low, high


def t_tail(t: float, degrees: float) -> float:
    """P(T > t) of Student's distribution, for t >= 0; the normal one where degrees are infinite."""
    if degrees > _MANY:
        return 0.5 * math.erfc(t / math.sqrt(2))
    return 0.5 * _incomplete_beta(degrees / (degrees + t * t), degrees / 2)


def t_quantile(probability: float, degrees: float) -> float:
    """Quantile of Student's distribution above its median."""
    if degrees > _MANY:
        return NormalDist().inv_cdf(probability)
    low, high = 0.0, 1.0
    while t_tail(high, degrees) > 1 - probability:
        high *= 2
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, degrees) > 1 - probability else (low, middle)
    return (low + high) / 2


def _mean_square(deviations: NDArray[np.float64], degrees: int) -> float:
    return float((deviations**2).sum() / degrees) if degrees > 0 else 0.0


def _incomplete_beta(x: float, a: float, b: float = 0.5) -> float:
    """Regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22)."""
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(1 - x, b, a)
    if x <= 0:
        return 0.0
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(log_front + a * math.log(x) + b * math.log1p(-x)) / a
    fraction = 1.0
    for m in range(300, 0, -1):  # from the innermost term outwards
        odd = -(a + m - 1) * (a + b + m - 1) * x / ((a + 2 * m - 2) * (a + 2 * m - 1))
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        fraction = 1 + odd / (1 + even / fraction)
    return front / fraction
