"""Tables from tokens: by relative position, by section, before each lead span, and by trace.

Letters: M traces, S lead spans, R resamples of the traces.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from student_train.profile.measure import TraceMeasures
from teacher_cache.format import SECTIONS, lead_span_length

NUM_BINS = 20
LEAD_SPANS = tuple(round((b + 1) / NUM_BINS, 2) for b in range(NUM_BINS))
NUM_RESAMPLES = 1000

_QUANTITIES = ("divergence", "nll", "teacher_entropy", "tail", "k")
_DECILES = tuple(d / 10 for d in range(1, 10))


def _values(measures: Sequence[TraceMeasures]) -> dict[str, NDArray[np.float64]]:
    """Every quantity of all tokens, one trace after the other."""
    columns = {"divergence": "divergence_N", "nll": "nll_N", "teacher_entropy": "entropy_N"}
    columns |= {"tail": "tail_N", "k": "k_N"}
    return {
        name: np.concatenate([getattr(one, column) for one in measures]).astype(np.float64)
        for name, column in columns.items()
    }


def position_rows(measures: Sequence[TraceMeasures]) -> list[dict[str, Any]]:
    """One row for each twentieth of a trace; those without a token are left out."""
    bins = np.concatenate([one.token_N * NUM_BINS // one.n_total for one in measures])
    bounds = [(b / NUM_BINS, (b + 1) / NUM_BINS) for b in range(NUM_BINS)]
    named = [{"begin": begin, "end": end} for begin, end in bounds]
    return _rows(measures, bins, named)


def section_rows(measures: Sequence[TraceMeasures]) -> list[dict[str, Any]]:
    """One row for each section; those without a token are left out."""
    sections = np.concatenate([one.section_N for one in measures])
    return _rows(measures, sections, [{"section": name} for name in SECTIONS])


def _rows(
    measures: Sequence[TraceMeasures],
    group: NDArray[np.int64],
    named: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    values = _values(measures)
    rows = []
    for number, name in enumerate(named):
        of_group = group == number
        if not of_group.any():
            continue
        row = {**name, "num_tokens": int(of_group.sum())}
        for quantity in ("divergence", "teacher_entropy"):
            row[f"{quantity}_share"] = float(
                values[quantity][of_group].sum() / max(values[quantity].sum(), 1e-300)
            )
        for quantity in _QUANTITIES:
            own = values[quantity][of_group]
            is_known = not np.isnan(own).any()  # tails of some caches are not
            row[quantity] = float(own.mean()) if is_known else None
            row[f"{quantity}_deciles"] = np.quantile(own, _DECILES).tolist() if is_known else None
        rows.append(row)
    return rows


@dataclass(frozen=True, eq=False)
class Coverage:
    """Share of the student's divergence before each lead span."""

    share_S: NDArray[np.float64]  # of all profiled traces
    entropy_share_S: NDArray[np.float64]  # the same of the teacher's entropy
    share_RS: NDArray[np.float64]  # of traces drawn anew with replacement

    @classmethod
    def of(cls, measures: Sequence[TraceMeasures], seed: int) -> "Coverage":
        """Sum the traces' quantities before each of `LEAD_SPANS`."""
        divergence_MS = np.array([_before(one, one.divergence_N) for one in measures])
        entropy_MS = np.array([_before(one, one.entropy_N) for one in measures])
        rng = np.random.default_rng(seed)
        num_traces = len(measures)
        weight_RM = rng.multinomial(num_traces, [1 / num_traces] * num_traces, NUM_RESAMPLES)
        return cls(
            _shares(divergence_MS.sum(axis=0)),
            _shares(entropy_MS.sum(axis=0)),
            _shares(weight_RM @ divergence_MS),
        )

    def interval(self, index: int) -> tuple[float, float]:
        """Interval of 95 % of the resamples' shares before `LEAD_SPANS[index]`."""
        low, high = np.percentile(self.share_RS[:, index], [2.5, 97.5])
        return float(low), float(high)

    def to_json(self) -> list[dict[str, float]]:
        """A row for each lead span."""
        rows = []
        for index, span in enumerate(LEAD_SPANS):
            low, high = self.interval(index)
            rows.append(
                {
                    "lead_span": span,
                    "divergence_share": float(self.share_S[index]),
                    "divergence_share_low": low,
                    "divergence_share_high": high,
                    "teacher_entropy_share": float(self.entropy_share_S[index]),
                }
            )
        return rows


def _before(one: TraceMeasures, values_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """[S] sums of the tokens inside each lead span."""
    ends = [lead_span_length(one.n_total, span) for span in LEAD_SPANS]
    cumulative = np.concatenate([[0.0], np.cumsum(values_N)])
    sums: NDArray[np.float64] = cumulative[np.searchsorted(one.token_N, ends)]
    return sums


def _shares(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares of the last column, which is the whole."""
    shares: NDArray[np.float64] = sums / np.maximum(sums[..., -1:], 1e-300)
    return shares


def trace_row(one: TraceMeasures) -> dict[str, Any]:
    """Figures of a trace for this student; over the chain of thought and the answer.

    The rank-surprisal ratio (arXiv 2601.14249) is the mean rank of the trace's tokens under the
    student over their mean negative log-likelihood: low where the student is surprised by tokens
    that it nevertheless ranks high. The paper prefers traces with a low ratio.
    """
    of = one.is_response_N
    rank, nll = _means(one)
    return {
        "student_divergence": float(one.divergence_N[of].mean()) if of.any() else None,
        "student_nll": nll,
        "student_rank": rank,
        "rank_surprisal_ratio": None if rank is None or not nll else rank / nll,
    }


def _means(one: TraceMeasures) -> tuple[float | None, float | None]:
    """Mean rank and mean negative log-likelihood of a trace's response."""
    of = one.is_response_N
    if not of.any():
        return None, None
    return float(one.rank_N[of].mean()), float(one.nll_N[of].mean())


def cache_row(measures: Sequence[TraceMeasures], seed: int) -> dict[str, Any]:
    """The rank-surprisal ratio of a cache: means over its traces of rank and of surprisal."""
    means = np.array([pair for pair in map(_means, measures) if None not in pair], np.float64)
    row: dict[str, Any] = {"num_traces": len(measures)}
    row["num_tokens"] = sum(len(one.token_N) for one in measures)
    row["student_divergence"] = float(
        np.mean(np.concatenate([one.divergence_N for one in measures]))
    )
    if not len(means):
        return {**row, "rank_surprisal_ratio": None}
    rng = np.random.default_rng(seed)
    weight_RM = rng.multinomial(len(means), [1 / len(means)] * len(means), NUM_RESAMPLES)
    drawn_R2 = weight_RM @ means
    low, high = np.percentile(drawn_R2[:, 0] / np.maximum(drawn_R2[:, 1], 1e-300), [2.5, 97.5])
    ratio = means[:, 0].sum() / max(means[:, 1].sum(), 1e-300)
    return {
        **row,
        "rank_surprisal_ratio": float(ratio),
        "rank_surprisal_ratio_low": float(low),
        "rank_surprisal_ratio_high": float(high),
    }
