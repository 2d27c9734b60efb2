"""Lead spans and bands, in integers. Imports nothing of ours.

A trace of n tokens is cut into S bands; band b holds tokens floor(n*b/S) to floor(n*(b+1)/S).
A lead span x keeps the first max(1, floor(n*x)) tokens, prompt included (arXiv 2512.21002).
"""

from collections.abc import Iterable
from fractions import Fraction
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray


def lead_span_length(n_total: int, lead_span: float) -> int:
    """Tokens kept of a trace of `n_total` tokens: max(1, floor(n_total * lead_span)).

    `lead_span` counts as the decimal that was written: 0.29 of 100 tokens is 29, although
    100 * 0.29 is 28.999... in binary.

    Raises:
        ValueError: If `lead_span` is not in (0, 1].
    """
    if not 0.0 < lead_span <= 1.0:
        raise ValueError(f"lead span: expected a proportion in (0, 1], got {lead_span}")
    exact = Fraction(str(float(lead_span)))
    return max(1, n_total * exact.numerator // exact.denominator)


def lead_span_lengths(n_total: NDArray[np.int64], lead_span: float) -> NDArray[np.int64]:
    """[n] `lead_span_length` of n traces; raises as it does."""
    if lead_span == 1.0:
        return n_total
    lengths, of_trace = np.unique(n_total, return_inverse=True)
    kept = [lead_span_length(length, lead_span) for length in lengths.tolist()]
    return np.array(kept, np.int64)[of_trace]


_Tokens = TypeVar("_Tokens", int, NDArray[np.int64])


def band_start(n_total: _Tokens, band: int, num_bands: int) -> _Tokens:
    """First token of a band, or the trace's end for `band` == `num_bands`."""
    return n_total * band // num_bands


def band_starts(n_total: NDArray[np.int64], num_bands: int) -> NDArray[np.int64]:
    """[num_bands + 1, n] `band_start` of every band of n traces, and their ends."""
    starts: NDArray[np.int64] = n_total * np.arange(num_bands + 1)[:, None] // num_bands
    return starts


def bands_of_tokens(num_held: _Tokens, keep: _Tokens, num_bands: int) -> _Tokens:
    """Number of leading bands of `num_bands` that hold the first `keep` of a trace's tokens.

    The smallest b with floor(num_held * b / num_bands) >= keep; 0 if nothing is kept.
    """
    # floor(n*b/S) >= keep  <=>  n*b >= keep*S  <=>  b >= ceil(keep*S/n)
    return -(-keep * num_bands // num_held)


def num_bands_needed(spans: Iterable[tuple[int, int]], num_bands: int) -> int:
    """Number of leading bands that hold the first `keep` tokens of every trace.

    Args:
        spans: (n_total, keep) per trace, 0 <= keep <= n_total.
        num_bands: S, bands per trace.

    Returns:
        The smallest b with floor(n_total*b/S) >= keep for all traces; 0 if nothing is kept.
    """
    return max((bands_of_tokens(n_total, keep, num_bands) for n_total, keep in spans), default=0)
