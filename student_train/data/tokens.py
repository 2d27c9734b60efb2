"""Selection of the tokens of a trace that are trained on, and of how many must be read."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format import (
    SECTIONS,
    Cache,
    Places,
    Trace,
    TraceInfo,
    lead_span_lengths,
)
from teacher_cache.format.lead_spans import LeadSpans, parse_span, parse_tokens
from teacher_cache.terminal.option import check_options, option

LOSS_RANGES = ("lead", "middle", "last")
WHOLES = ("trace", "reasoning")

_tokens = partial(option, group="What enters the loss")


@dataclass(frozen=True)
class TokenSelection:
    """A lead span or a token budget, and the sections inside it.

    With a mixture of lengths it represents several selections, `choices`; `draw_spans` gives
    every trace one of them. Only a selection of one length has tokens.

    A middle or last part has as many tokens as the lead span and keeps all tokens before it as
    context (the paper cuts it out instead, which `cache-teacher score --slice` captures).

    Raises:
        ValueError: If a value is outside its range or choices, or a lead span and a budget are
            both given.
    """

    lead_span: float | LeadSpans | None = _tokens(
        "Proportion of every trace to train on, from its start; or several with weights, such as "
        "0.375:4,1:1, of which each trace gets one: here a fifth of the traces are whole.",
        default=None,
        basic=True,
        above=0,
        at_most=1,
        unset="whole traces",
        metavar="SPAN",
        parse=parse_span,
    )
    trace_tokens: int | LeadSpans | None = _tokens(
        "Number of tokens of every trace to train on, instead of a lead span; or several with "
        "weights.",
        default=None,
        at_least=1,
        metavar="TOKENS",
        parse=parse_tokens,
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
        if isinstance(self.trace_tokens, LeadSpans):
            for length in self.trace_tokens.lengths:
                if length != int(length):
                    raise ValueError(f"--trace-tokens: expected whole numbers, got {length:g}")
        for choice in self.choices if len(self.choices) > 1 else ():
            check_options(choice)

    @property
    def lengths(self) -> LeadSpans:
        """The proportions or numbers of tokens; a single one where every trace has the same."""
        length = self.lead_span if self.trace_tokens is None else self.trace_tokens
        if isinstance(length, LeadSpans):
            return length
        return LeadSpans((1.0 if length is None else length,), (1.0,))

    @cached_property
    def choices(self) -> tuple["TokenSelection", ...]:
        """One selection per length, in the order of `lengths`."""
        if isinstance(self.trace_tokens, LeadSpans):
            return tuple(replace(self, trace_tokens=int(n)) for n in self.trace_tokens.lengths)
        if isinstance(self.lead_span, LeadSpans):
            return tuple(replace(self, lead_span=span) for span in self.lead_span.lengths)
        return (self,)

    def span(self, trace: Trace | TraceInfo) -> tuple[int, int]:
        """First token and end of the part of a trace from which its sections are taken.

        Raises:
            TypeError: If the selection has several lengths.
        """
        (first,), (end,) = (part.tolist() for part in self.spans(TraceBounds.of(trace)))
        return first, end

    def spans(self, bounds: "TraceBounds") -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """([n], [n]) `span` of n traces; raises as it does."""
        if isinstance(self.lead_span, LeadSpans) or isinstance(self.trace_tokens, LeadSpans):
            raise TypeError(f"{self}: expected a selection of one length; see `choices`")
        whole = self.whole(bounds)
        if self.trace_tokens is not None:
            keep = np.minimum(self.trace_tokens, whole)
        else:
            span = 1.0 if self.lead_span is None else self.lead_span
            keep = np.minimum(lead_span_lengths(whole, span), whole)
        spare = whole - keep
        first = {"lead": np.zeros_like(keep), "middle": spare // 2, "last": spare}[self.loss_on]
        return first, first + keep

    def whole(self, bounds: "TraceBounds") -> NDArray[np.int64]:
        """[n] Number of tokens that the length is a proportion of."""
        return bounds.answer_start if self.lead_span_of == "reasoning" else bounds.n_total

    def __str__(self) -> str:
        part = {"lead": "first", "middle": "middle", "last": "last"}[self.loss_on]
        of, many = "trace", "traces"
        if self.lead_span_of == "reasoning":
            of, many = "trace before its answer", "traces before the answer"
        pairs = list(zip(self.lengths.lengths, self.lengths.shares, strict=True))
        texts = [f"{n:g}" if self.trace_tokens is None else f"{int(n):,} tokens" for n, _ in pairs]
        if len(pairs) > 1:
            texts = [
                f"{text} of {100 * p:.3g} %" for text, (_, p) in zip(texts, pairs, strict=True)
            ]
            span = f"the {part} {' and '.join(texts)} of the {many}"
        elif self.trace_tokens is not None or pairs[0][0] < 1:
            span = f"the {part} {texts[0]} of every {of}"
        else:
            span = f"whole {many}"
        return f"{span}, sections {', '.join(self.sections)}"

    def ranges(self, trace: Trace | TraceInfo) -> list[tuple[int, int]]:
        """Half-open ranges of the tokens trained on, in order; token 0 has no distribution.

        They refer to the whole trace, however many of its first tokens a `Trace` holds.
        """
        found = self.ranges_each(TraceBounds.of(trace))
        pairs = ((int(first[0]), int(end[0])) for first, end in found)
        return [(first, end) for first, end in pairs if first < end]

    def ranges_each(
        self, bounds: "TraceBounds"
    ) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """([n], [n]) per section: first token trained on and end, equal where there is none."""
        first_of_span, end_of_span = self.spans(bounds)
        starts = (bounds.n_total * 0, bounds.cot_start, bounds.answer_start)
        ends = (bounds.cot_start, bounds.answer_start, bounds.n_total)
        found = []
        for section, start, end in zip(SECTIONS, starts, ends, strict=True):
            if section in self.sections:
                first = np.maximum(np.maximum(start, 1), first_of_span)
                found.append((first, np.maximum(first, np.minimum(end, end_of_span))))
        return found

    def num_read(self, trace: Trace | TraceInfo) -> int:
        """Number of first tokens that hold everything trained on; at least 1."""
        return int(self.num_read_each(TraceBounds.of(trace))[0])

    def num_read_each(self, bounds: "TraceBounds") -> NDArray[np.int64]:
        """[n] `num_read` of n traces."""
        num_read = np.ones_like(bounds.n_total)
        for first, end in self.ranges_each(bounds):
            num_read = np.where(first < end, end, num_read)
        return num_read

    def selected(self, traces: Iterable[Trace]) -> list["SelectedTrace"]:
        """The traces, each with this selection, which has one length."""
        return [SelectedTrace(trace, self) for trace in traces]


@dataclass(frozen=True)
class TraceBounds:
    """Lengths and section bounds of n traces."""

    n_total: NDArray[np.int64]  # [n]
    cot_start: NDArray[np.int64]  # [n]
    answer_start: NDArray[np.int64]  # [n]

    @classmethod
    def of(cls, trace: Trace | TraceInfo) -> "TraceBounds":
        """The bounds of one trace."""
        values = (trace.n_total, trace.cot_start, trace.answer_start)
        return cls(*(np.array([value], np.int64) for value in values))

    @classmethod
    def of_places(cls, cache: Cache, places: Places) -> "TraceBounds":
        """The bounds of some traces of a cache; no shard is read."""
        names = ("n_total", "cot_start", "answer_start")
        return cls(*(cache.catalog.numbers(name)[places.catalog_rows] for name in names))

    def where(self, chosen: NDArray[np.bool_]) -> "TraceBounds":
        """The bounds of the chosen ones among the n traces."""
        return TraceBounds(*(v[chosen] for v in (self.n_total, self.cot_start, self.answer_start)))


@dataclass(frozen=True)
class SelectedTrace:
    """A trace and which of its tokens are trained on."""

    trace: Trace  # holding at least these tokens
    selection: TokenSelection  # of one length
    source: int = 0  # its cache, where a run has several


@dataclass(frozen=True)
class LossDropout:
    """Labels left out at random, drawn anew for every epoch and trace."""

    share: float  # of a trace's loss tokens
    seed: int
    epoch: int

    def kept(self, trace_id: str, num_valid: int) -> NDArray[np.bool_]:
        """[num_valid] True, except for round(share * num_valid) of them."""
        digest = hashlib.sha256(f"{self.seed}/{self.epoch}/{trace_id}".encode()).digest()
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(digest))))
        # Sorting random numbers, because numpy does not promise that `choice` stays the same.
        order = np.argsort(rng.random(num_valid), kind="stable")
        kept = np.ones(num_valid, np.bool_)
        kept[order[: round(self.share * num_valid)]] = False
        return kept
