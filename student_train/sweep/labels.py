"""Groups and figures in words, for a reader who has not seen the options."""

from collections.abc import Callable, Mapping
from typing import Any

from student_train.sweep.cells import FULL
from student_train.sweep.groups import Estimate, Group
from teacher_cache.format.lead_spans import LeadSpans
from teacher_cache.pages.numbers import percent

_KINDS = {
    "base": "untrained student",
    "sft": "whole traces, hard labels only",
    "half-steps": "whole traces, half the steps",
    "half-traces": "half as many traces, whole",
    "live": "whole traces, teacher in memory",
}
_PARTS = {"lead": "first", "middle": "middle", "last": "last"}
_SECTIONS = {"prompt": "prompt", "cot": "reasoning", "answer": "answer"}
_MOST_NAMED = 3  # lengths of a mixture; more do not fit beside a bar


def label(group: Group) -> str:
    """Label of a group's training data, such as `first 50 % of each trace`."""
    options = group.options
    if group.name == FULL:
        return "whole traces"
    if group.kind in _KINDS:
        return _KINDS[group.kind]
    parts = [_length(options)]
    if "sections" in options:
        names = [_SECTIONS.get(name, str(name)) for name in options["sections"]]
        parts.append(f"{' and '.join(names)} only")
    if "loss_dropout" in options:
        parts.append(f"{percent(options['loss_dropout'])} of the labels left out at random")
    return ", ".join(parts)


def short_label(group: Group) -> str:
    """A label for a point in a picture."""
    if group.name == FULL:
        return "whole traces"
    if group.is_plain_span:
        return f"first {percent(float(group.options['lead_span']))}"
    short = {"base": "untrained", "half-steps": "half the steps", "half-traces": "half the traces"}
    return short.get(group.kind, label(group).partition(":")[0])


def _length(options: Mapping[str, Any]) -> str:
    part = _PARTS.get(options.get("loss_on", "lead"), str(options.get("loss_on")))
    whole = "the reasoning" if options.get("lead_span_of") == "reasoning" else "each trace"
    if "trace_tokens" in options:
        tokens = options["trace_tokens"]
        if isinstance(tokens, str):
            return _mixture(tokens, lambda number: f"cut at {number:g} tokens")
        return f"{part} {tokens:g} tokens of each trace"
    span = options.get("lead_span", 1.0)
    if isinstance(span, str):
        return _mixture(span, lambda own: "whole" if own == 1 else f"cut at {percent(own)}")
    return "whole traces" if span == 1 else f"{part} {percent(span)} of {whole}"


def _mixture(lengths: str, name: Callable[[float], str]) -> str:
    """Turn `0.375:4,1:1` into `mixture: 80 % of the traces cut at 37.5 %, 20 % whole`."""
    spans = LeadSpans.parse(lengths)
    if len(spans.lengths) > _MOST_NAMED:
        first, last, mean = (
            name(length).removeprefix("cut at ")
            for length in (spans.lengths[0], spans.lengths[-1], spans.mean)
        )
        return f"random lengths: {len(spans.lengths)} from {first} to {last}, mean {mean}"
    shares = [percent(share) for share in spans.shares]
    shares[0] += " of the traces"
    named = [f"{share} {name(length)}" for share, length in zip(shares, spans.lengths, strict=True)]
    return f"mixture: {', '.join(named)}"


def whole_percent(share: float) -> str:
    """Whole percent such as `93 %`; an infinite share is written in words."""
    if share in (float("inf"), float("-inf")):
        return "any more" if share > 0 else "any less"
    return f"{round(100 * share)} %"


def with_interval(estimate: Estimate) -> str:
    """`93 % (90 % to 96 %)`."""
    low, high = whole_percent(estimate.low), whole_percent(estimate.high)
    return f"{whole_percent(estimate.value)} ({low} to {high})"
