"""Which tokens of a trace are trained on, and how many must be read for that. Integers only."""

from collections.abc import Iterable
from dataclasses import dataclass

from teacher_cache.format import TraceInfo, lead_span_length

ALL_SECTIONS = ("prompt", "cot", "answer")


@dataclass(frozen=True)
class TokenSelection:
    """A lead span or a token budget, and the sections inside it.

    Raises:
        ValueError: If the lead span is not in (0, 1], a budget stands beside it or is below 1, or a
            section is unknown or none is named.
    """

    lead_span: float | None = None  # proportion of every trace; whole traces where both are None
    max_tokens: int | None = None
    sections: tuple[str, ...] = ALL_SECTIONS

    def __post_init__(self) -> None:
        if self.lead_span is not None and self.max_tokens is not None:
            raise ValueError("give a lead span or max_tokens, not both")
        if self.lead_span is not None:
            lead_span_length(1, self.lead_span)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens: expected at least 1, got {self.max_tokens}")
        unknown = [name for name in self.sections if name not in ALL_SECTIONS]
        if unknown or not self.sections:
            raise ValueError(
                f"sections: expected some of {', '.join(ALL_SECTIONS)}, got "
                f"{', '.join(map(repr, unknown)) or 'none'}"
            )

    def keep(self, n_total: int) -> int:
        """Length of the lead span of a trace of `n_total` tokens."""
        if self.max_tokens is not None:
            return min(self.max_tokens, n_total)
        return lead_span_length(n_total, 1.0 if self.lead_span is None else self.lead_span)

    def __str__(self) -> str:
        if self.max_tokens is not None:
            span = f"the first {self.max_tokens:,} tokens of every trace"
        elif self.lead_span is not None and self.lead_span < 1.0:
            span = f"the first {self.lead_span:g} of every trace"
        else:
            span = "whole traces"
        return f"{span}, sections {', '.join(self.sections)}"

    def ranges(self, n_total: int, cot_start: int, answer_start: int) -> list[tuple[int, int]]:
        """Half-open ranges of the tokens trained on, in order; token 0 has no distribution."""
        bounds = (1, max(1, cot_start), max(1, answer_start), n_total)
        keep = self.keep(n_total)
        found = []
        for section, first, end in zip(ALL_SECTIONS, bounds, bounds[1:], strict=False):
            if section in self.sections and first < min(end, keep):
                found.append((first, min(end, keep)))
        return found

    def num_read(self, info: TraceInfo) -> int:
        """How many of its first tokens hold everything trained on; at least 1."""
        ranges = self.ranges(info.n_total, info.cot_start, info.answer_start)
        return ranges[-1][1] if ranges else 1

    def selects_any(self, traces: Iterable[TraceInfo]) -> bool:
        """Whether a token of any of these traces is trained on."""
        return any(self.ranges(t.n_total, t.cot_start, t.answer_start) for t in traces)
