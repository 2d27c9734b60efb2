"""Functions of single numbers for Triton kernels: logarithms, and the divergences' terms.

Those of a GPU's mathematics library do not run in Triton's interpreter, in which every kernel of
this package is tested, so what Triton itself lacks is written here.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no types
def expm1(x: tl.tensor) -> tl.tensor:
    """exp(x) - 1 without cancellation: the rounding of exp(x) cancels in the quotient (Kahan)."""
    e = tl.exp(x)
    is_near = (tl.abs(x) < 0.5) & (e != 1.0)
    quotient = (e - 1.0) * x / tl.log(tl.where(is_near, e, 2.0))
    return tl.where(is_near, quotient, tl.where(e == 1.0, x, e - 1.0))


@triton.jit  # type: ignore[untyped-decorator]  # as above
def log1p(x: tl.tensor) -> tl.tensor:
    """log(1 + x) without cancellation, by the same quotient."""
    one_more = 1.0 + x
    moved = one_more - 1.0
    quotient = tl.log(one_more) * x / tl.where(moved == 0.0, 1.0, moved)
    return tl.where(moved == 0.0, x, quotient)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def log_sigmoid(x: tl.tensor) -> tl.tensor:
    """log(1 / (1 + exp(-x))), also of infinities."""
    return tl.where(x < 0.0, x, 0.0) - log1p(tl.exp(-tl.abs(x)))


@triton.jit  # type: ignore[untyped-decorator]  # as above
def tanh(x: tl.tensor) -> tl.tensor:
    """Hyperbolic tangent, with the absolute error of numbers near 1, where a cap needs it."""
    e = tl.exp(-2.0 * tl.abs(x))
    positive = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -positive, positive)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def divergence_terms(
    log_p: tl.tensor, log_q: tl.tensor, divergence: tl.constexpr, mix: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Term and derivative by log q of each outcome, as `divergence.divergence_terms` has them."""
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    # Both are -inf in padding, where the difference must be 0; NaN must stay NaN.
    d = tl.where(log_p == log_q, 0.0, log_q - log_p)
    excess = tl.where(d > 1.0, q - p, p * expm1(tl.where(d > 1.0, 1.0, d)))  # q - p
    p_d = _times(p, d)
    q_d = _times(q, d)
    if divergence == "forward_kl":
        terms = excess - p_d
        by_log_q = excess
    elif divergence == "reverse_kl":
        terms = q_d - excess
        by_log_q = q_d
    elif divergence == "combined_kl":
        terms = mix * (excess - p_d) + (1 - mix) * (q_d - excess)
        by_log_q = mix * excess + (1 - mix) * q_d
    elif divergence == "jsd":
        log_p_m, log_q_m = _log_ratios_to_mixture(d, 1 - mix)
        terms = mix * _times(p, log_p_m) + (1 - mix) * _times(q, log_q_m)
        by_log_q = (1 - mix) * _times(q, log_q_m)
    elif divergence == "skew_kl":
        log_p_m, _ = _log_ratios_to_mixture(d, 1 - mix)
        terms = _times(p, log_p_m) + (1 - mix) * excess
        by_log_q = -(1 - mix) * q * expm1(log_p_m)
    elif divergence == "skew_reverse_kl":
        _, log_q_m = _log_ratios_to_mixture(d, mix)
        terms = _times(q, log_q_m) - (1 - mix) * excess
        by_log_q = q * (log_q_m - mix * expm1(log_q_m))
    else:
        tl.static_assert(divergence == "tvd")
        terms = tl.abs(excess) / 2
        by_log_q = tl.where(excess > 0.0, q, tl.where(excess < 0.0, -q, 0.0)) / 2
    return terms, by_log_q


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _times(mass: tl.tensor, log_ratio: tl.tensor) -> tl.tensor:
    """The product, 0 where there is no mass."""
    return tl.where(mass == 0.0, 0.0, mass * log_ratio)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _log_ratios_to_mixture(d: tl.tensor, share: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """log(p / m) and log(q / m) of m = (1 - share) p + share q, from d = log(q / p)."""
    is_more = d > 0.0
    from_p = log1p(share * expm1(tl.where(is_more, 0.0, d)))  # log(m / p) where d <= 0
    from_q = log1p((1 - share) * expm1(tl.where(is_more, -d, 0.0)))  # log(m / q) where d > 0
    return tl.where(is_more, -from_q - d, -from_p), tl.where(is_more, -from_q, d - from_p)
