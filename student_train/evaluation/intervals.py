"""Intervals of 95 %: of a share, of shares of several samples per problem."""

import math
from collections.abc import Sequence

Z_95 = 1.959963984540054  # standard normal quantile at 0.975


def wilson_interval(num_right: int, num_all: int) -> tuple[float, float]:
    """Score interval of 95 % for a proportion (Wilson 1927).

        (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)

    Args:
        num_right: Successes.
        num_all: Trials, at least 1.
    """
    share = num_right / num_all
    z2 = Z_95**2
    centre = share + z2 / (2 * num_all)
    spread = Z_95 * math.sqrt(share * (1 - share) / num_all + z2 / (4 * num_all**2))
    scale = 1 + z2 / num_all
    low = (centre - spread) / scale if num_right else 0.0  # exactly, where rounding says about
    high = (centre + spread) / scale if num_right < num_all else 1.0
    return low, high


def clustered_interval(num_right: Sequence[int], num_samples: int) -> tuple[float, float]:
    """Interval of 95 % for avg@n: samples of one problem are alike, problems are independent.

        p = mean(m_i), p +- z sqrt(sum((m_i - p)^2) / (P (P - 1))), m_i = num_right_i / n

    the standard error clustered by problem (Miller 2024, arXiv 2411.00640), cut to [0, 1]. With one
    sample per problem, or no spread between problems to estimate it from, Wilson's.

    Args:
        num_right: [P] of the samples of each problem.
        num_samples: n, of every problem.
    """
    num_problems = len(num_right)
    means = [right / num_samples for right in num_right]
    share = sum(means) / num_problems
    squares = sum((mean - share) ** 2 for mean in means)
    if num_samples == 1 or squares == 0 or num_problems == 1:
        return wilson_interval(round(share * num_problems), num_problems)
    spread = Z_95 * math.sqrt(squares / (num_problems * (num_problems - 1)))
    return max(0.0, share - spread), min(1.0, share + spread)
