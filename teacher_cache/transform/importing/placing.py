"""Which token a row of a foreign cache belongs to: told by the rows, not assumed.

Programs store the distribution over a token beside that token, or beside the one before it (as a
model puts its logits out), or a few tokens late (Axolotl counts rows from the end, where its chat
template may have written more than the teacher). Off by one, a cache looks whole and teaches
nonsense. So all these are tried on the first traces: at the right one, the tokens that really
came are probable.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from teacher_cache.sources import SourceError
from teacher_cache.transform.importing.foreign import ForeignTrace

# Tokens between a row and its own token, both counted from the end: 0 beside it, 1 beside the token
# before it, below 0 after it.
SHIFTS = (0, 1, -1, -2, -3)
# Of the fits of the best two, and of the best, for it to be believed. Rows of other tokens give
# what came 0.02 or so; text that surprises its teacher at every second token 0.3.
_LEAST_RATIO, _LEAST_PROBABILITY = 1.5, 0.1
# Of one trace, which has fewer rows and may repeat itself: fits elsewhere and here, and rows, for
# it to be believed that it stands elsewhere.
_CLEAR_RATIO, _FEWEST_ROWS = 2.0, 8
_OFFSETS = range(min(SHIFTS) - max(SHIFTS), max(SHIFTS) - min(SHIFTS) + 1)


def first_token(trace: ForeignTrace, shift: int) -> int:
    """Token of row 0: with a shift of 0 the last row belongs to the last token."""
    if trace.first_token is not None:
        return trace.first_token
    return len(trace.token_ids) - len(trace.top_ids) + shift


def found_shift(traces: Sequence[ForeignTrace]) -> int:
    """The shift at which rows fit their tokens; 0 where they say themselves where they belong.

    Raises:
        SourceError: If none does, or two about equally well.
    """
    traces = [trace for trace in traces if trace.first_token is None]
    if not traces:
        return 0
    fits = {shift: fit_at(traces, shift) for shift in SHIFTS}
    best, second = sorted(SHIFTS, key=lambda shift: -fits[shift])[:2]
    if fits[best] < max(_LEAST_PROBABILITY, _LEAST_RATIO * fits[second]):
        found = ", ".join(f"{shift}: {fits[shift]:.3g}" for shift in SHIFTS)
        raise SourceError(
            f"the rows of the first {len(traces):,} traces fit their tokens nowhere. Mean "
            f"probability that they give to what came, by shift: {found}; expected one to be "
            f"{_LEAST_PROBABILITY:g} at least, and {_LEAST_RATIO:g} times the others. They are of "
            "another tokenizer or other traces; if you know better, say where they stand with "
            "--row-shift"
        )
    return best


def better_place(trace: ForeignTrace, first: int) -> int | None:
    """Tokens by which a trace's rows would have to move to fit clearly better; None if they do not.

    Args:
        trace: Trace whose rows are looked at.
        first: Token of row 0, as it is placed.
    """
    here = realised_probability(trace, first)
    if len(here) < _FEWEST_ROWS or here.mean() * _CLEAR_RATIO >= 1:
        return None
    fits = {}
    for offset in _OFFSETS:
        found = realised_probability(trace, first + offset)
        if offset and len(found) >= len(here) / 2:
            fits[offset] = float(found.mean())
    best = max(fits, key=lambda offset: fits[offset], default=0)
    if best and fits[best] >= max(_LEAST_PROBABILITY, _CLEAR_RATIO * float(here.mean())):
        return best
    return None


def fit_at(traces: Sequence[ForeignTrace], shift: int) -> float:
    """Mean probability that rows give to their tokens, if they stand at this shift."""
    found = [
        realised_probability(trace, first)
        for trace in traces
        if (first := first_token(trace, shift)) >= 0 or len(trace.top_ids) + first > 1
    ]
    probabilities = np.concatenate(found or [np.zeros(0)])
    return float(probabilities.mean()) if len(probabilities) else 0.0


def realised_probability(trace: ForeignTrace, first: int) -> NDArray[np.float64]:
    """[R'] probability of each token in its own row (softmax of its entries); 0 if it is not there.

    Args:
        trace: Trace whose rows are looked at.
        first: Token of row 0.
    """
    rows = placed_rows(trace, first)
    values = trace.values[rows].astype(np.float64)
    tokens = trace.token_ids[first + np.arange(len(trace.top_ids))[rows]]
    has_any = np.isfinite(values).any(axis=1)
    values, tokens = values[has_any], tokens[has_any]
    ids = trace.top_ids[rows][has_any]
    if not len(values):
        return np.zeros(0)
    weights = np.exp(values - values.max(axis=1, keepdims=True))
    hits = np.where(ids == tokens[:, None], weights, 0.0)
    shares: NDArray[np.float64] = hits.sum(axis=1) / weights.sum(axis=1)
    return shares


def placed_rows(trace: ForeignTrace, first: int) -> slice:
    """Rows that belong to a token of the trace other than its first, which has none."""
    start = max(0, 1 - first)
    end = max(start, min(len(trace.top_ids), len(trace.token_ids) - first))
    return slice(start, end)
