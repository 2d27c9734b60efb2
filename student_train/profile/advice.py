"""Recommendation of the profile, how sure it is, and why it may be wrong.

The rule: where a fixed lead span of at most half a trace holds nearly all of the student's
divergence, that span; else a mixture of half the cost, a fifth of the traces whole and the others
cut at 0.375, which keeps the ends of traces in training. Its numbers come from one task
(tools/results/truncation): a forecast to be tested by a sweep, not a finding.

There the shares show where a gain begins, not how much of it a span keeps: before 0.4 lies 12 % of
the divergence and runs kept 14 % of the gain, before 0.5 lies 23 % and runs kept 69 %, since a
skill is learned from its first occurrences. The teacher's entropy is no guide: 54 % of it lies
before 0.1, where runs lost.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from student_train.profile.figures import LEAD_SPANS, Coverage
from teacher_cache.format.lead_spans import LeadSpans

WANTED_SHARE = 0.9
LONGEST_FIXED_SPAN = 0.5  # a longer one costs more than the mixture
MIXTURE = LeadSpans((0.375, 1.0), (4.0, 1.0))
MIN_TRACES = 50  # fewer say too little of a cache, whatever their resamples say


@dataclass(frozen=True)
class Advice:
    """A lead span or mixture for this student and cache.

    Attributes:
        lead_span: Value for `train-student run --lead-span`.
        mean_lead_span: Its cost as a share of whole traces.
        agreement: Share of the resamples of the traces that lead to the same recommendation.
        is_sure: Whether nearly all of them do, and there are enough traces.
        sentence: The recommendation in words.
    """

    lead_span: str
    mean_lead_span: float
    agreement: float
    is_sure: bool
    sentence: str

    @classmethod
    def of(cls, coverage: Coverage, num_traces: int) -> "Advice":
        """Apply the rule to the traces and to their resamples."""
        chosen = _fixed_span(coverage.share_S)
        drawn = np.array([_fixed_span(share_S) for share_S in coverage.share_RS])
        if chosen <= LONGEST_FIXED_SPAN:
            lead_span, mean, agreement = f"{chosen:g}", chosen, float(np.mean(drawn == chosen))
        else:
            lead_span, mean = str(MIXTURE), MIXTURE.mean
            agreement = float(np.mean(drawn > LONGEST_FIXED_SPAN))
        is_sure = agreement >= 0.95 and num_traces >= MIN_TRACES
        half = LEAD_SPANS.index(0.5)
        low, high = coverage.interval(half)
        sentence = (
            f"{coverage.share_S[half]:.0%} of the student's divergence from the teacher lies "
            f"before a lead span of 0.5 (95 % interval {low:.0%} to {high:.0%}), and "
            f"{WANTED_SHARE:.0%} of it before {chosen:g}. Recommended: --lead-span {lead_span}, at "
            f"{mean:.0%} of the tokens of whole traces; {agreement:.0%} of the resamples of the "
            f"{num_traces:,} traces say the same"
        )
        if num_traces < MIN_TRACES:
            sentence += f", but {MIN_TRACES} traces or more are needed to rely on that"
        elif not is_sure:
            sentence += ", which is not sure; profile more traces"
        sentence += (
            ". This is a forecast by a rule that was found on one task: compare it with whole "
            "traces and half the steps in a sweep before relying on it."
        )
        return cls(lead_span, mean, agreement, is_sure, sentence)


def _fixed_span(share_S: NDArray[np.float64]) -> float:
    """Shortest lead span that holds the wanted share of the divergence."""
    return LEAD_SPANS[int(np.argmax(share_S >= WANTED_SHARE - 1e-9))]
