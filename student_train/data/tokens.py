"""Which tokens of a trace are trained on, and how many must be read for that."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format import SECTIONS, Trace, TraceInfo, lead_span_length
from teacher_cache.terminal.option import check_options, option

LOSS_RANGES = ("lead", "middle", "last")
WHOLES = ("trace", "reasoning")

_tokens = partial(option, group="What enters the loss")


@dataclass(frozen=True)
class TokenSelection:
    """A lead span or a token budget, and the sections inside it.

    A middle or last part has as many tokens as the lead span and keeps all tokens before it as
    context (the paper cuts it out instead, which `cache-teacher score --slice` captures).

    Raises:
        ValueError: If a value is outside its range or choices, or a lead span and a budget are
            both given.
    """

    lead_span: float | None = _tokens(
        "Proportion of every trace to train on, from its start.",
        default=None,
        basic=True,
        above=0,
        at_most=1,
        unset="whole traces",
    )
    trace_tokens: int | None = _tokens(
        "Number of tokens of every trace to train on, instead of a lead span.",
        default=None,
        at_least=1,
    )
    sections: tuple[str, ...] = _tokens(
        "Sections whose tokens enter the loss, with commas between them.",
        default=SECTIONS,
        choices=SECTIONS,
    )
    loss_on: str = _tokens(
        "Part of a trace that has the length of the lead span and enters the loss; tokens before "
        "it are context.",
        default="lead",
        choices=LOSS_RANGES,
    )
    lead_span_of: str = _tokens(
        "What the lead span is a proportion of; reasoning leaves the answer out first.",
        default="trace",
        choices=WHOLES,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.lead_span is not None and self.trace_tokens is not None:
            raise ValueError("--trace-tokens: give it or --lead-span, not both")

    def span(self, trace: Trace | TraceInfo) -> tuple[int, int]:
        """First token and end of the part of a trace that its sections are looked for in."""
        whole = trace.answer_start if self.lead_span_of == "reasoning" else trace.n_total
        if self.trace_tokens is not None:
            keep = self.trace_tokens
        else:
            keep = lead_span_length(whole, 1.0 if self.lead_span is None else self.lead_span)
        keep = min(keep, whole)
        first = {"lead": 0, "middle": (whole - keep) // 2, "last": whole - keep}[self.loss_on]
        return first, first + keep

    def __str__(self) -> str:
        part = {"lead": "first", "middle": "middle", "last": "last"}[self.loss_on]
        of = "every trace" if self.lead_span_of == "trace" else "every trace before its answer"
        if self.trace_tokens is not None:
            span = f"the {part} {self.trace_tokens:,} tokens of {of}"
        elif self.lead_span is not None and self.lead_span < 1.0:
            span = f"the {part} {self.lead_span:g} of {of}"
        else:
            span = (
                "whole traces" if self.lead_span_of == "trace" else "whole traces before the answer"
            )
        return f"{span}, sections {', '.join(self.sections)}"

    def ranges(self, trace: Trace | TraceInfo) -> list[tuple[int, int]]:
        """Half-open ranges of the tokens trained on, in order; token 0 has no distribution.

        They are those of the whole trace, however many of its first tokens a `Trace` holds.
        """
        bounds = (1, max(1, trace.cot_start), max(1, trace.answer_start), trace.n_total)
        span = self.span(trace)
        found = []
        for section, *bound in zip(SECTIONS, bounds, bounds[1:], strict=False):
            first, end = max(bound[0], span[0]), min(bound[1], span[1])
            if section in self.sections and first < end:
                found.append((first, end))
        return found

    def num_read(self, trace: Trace | TraceInfo) -> int:
        """How many of its first tokens hold everything trained on; at least 1."""
        ranges = self.ranges(trace)
        return ranges[-1][1] if ranges else 1

    def selects_any(self, traces: Iterable[TraceInfo]) -> bool:
        """Whether a token of any of these traces is trained on."""
        return any(self.ranges(info) for info in traces)

    def cot_share(self, traces: Iterable[TraceInfo]) -> float:
        """Share of all tokens of the chains of thought that are trained on; 0 without any."""
        num_selected = num_all = 0
        for info in traces:
            first, end = max(1, info.cot_start), info.answer_start
            num_all += max(0, end - first)
            for left, right in self.ranges(info):
                num_selected += max(0, min(right, end) - max(left, first))
        return num_selected / max(1, num_all)


@dataclass(frozen=True)
class LossDropout:
    """Labels left out at random, drawn anew for every epoch and trace."""

    share: float  # of a trace's valid tokens
    seed: int
    epoch: int

    def kept(self, trace_id: str, num_valid: int) -> NDArray[np.bool_]:
        """[num_valid] True but for round(share * num_valid) of them."""
        digest = hashlib.sha256(f"{self.seed}/{self.epoch}/{trace_id}".encode()).digest()
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(digest))))
        # Sorting random numbers, because numpy does not promise that `choice` stays the same.
        order = np.argsort(rng.random(num_valid), kind="stable")
        kept = np.ones(num_valid, np.bool_)
        kept[order[: round(self.share * num_valid)]] = False
        return kept
