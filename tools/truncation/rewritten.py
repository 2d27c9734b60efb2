"""Caches whose traces are cut in ways that `--lead-span` does not offer, to train on as they are.

    python tools/truncation/rewritten.py endings CACHE OUT LEAD_SPAN
    python tools/truncation/rewritten.py gap CACHE OUT LEAD_SPAN STUDENT

`endings` puts the end of every trace (the closing mark of its chain of thought, and its answer)
behind its first part, with the teacher's distributions from the whole trace (arXiv 2603.13274).
`gap` cuts every trace where the untrained student's divergence before the cut is the same share of
its divergence over the trace, a share for which this part of all tokens stays (2601.10064).
Experiments, not a way to make caches for use.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from student_train.model.forward import StudentWithLoss
from student_train.model.load import head_of, load_model
from student_train.profile.measure import measured
from teacher_cache.format import (
    Cache,
    CacheWriter,
    FinishedTrace,
    Trace,
    lead_span_length,
    open_cache,
    seal_cache,
)


def with_tokens(trace: Trace, tokens: NDArray[np.int64]) -> Trace:
    """A trace of some tokens of another, with their distributions; bounds are the caller's."""
    is_kept = np.zeros(len(trace), bool)
    is_kept[tokens] = True
    entries = np.repeat(is_kept, trace.k)
    return replace(
        trace,
        token_ids=trace.token_ids[tokens],
        n_total=len(tokens),
        k=trace.k[tokens],
        top_ids=trace.top_ids[entries],
        top_logits=trace.top_logits[entries],
        tail_logit=trace.tail_logit[tokens],
    )


def first_part(trace: Trace, num_tokens: int) -> Trace:
    """The first tokens as a trace of their own, cut off."""
    bounds = {name: min(getattr(trace, name), num_tokens) for name in ("cot_start", "answer_start")}
    cut = with_tokens(replace(trace, **bounds), np.arange(num_tokens))
    return replace(cut, finish_reason="length" if num_tokens < len(trace) else trace.finish_reason)


def with_ending(trace: Trace, lead_span: float, num_closing: int) -> Trace:
    """The first part of a trace, followed by its closing mark and answer."""
    end, start = lead_span_length(len(trace), lead_span), trace.answer_start - num_closing
    if end >= start:
        return trace
    tokens = np.concatenate([np.arange(end), np.arange(start, len(trace))])
    bounds = {"cot_start": min(trace.cot_start, end), "answer_start": end + num_closing}
    return with_tokens(replace(trace, **bounds), tokens)


def cut_at_gap(cache: Cache, share: float, student: str) -> Iterator[Trace]:
    """Traces cut where an equal share of each one's divergence is reached."""
    traces = list(cache)
    model, _ = load_model(student, dtype=torch.float32)
    with_loss, ends = StudentWithLoss(model, head_of(model)).eval(), {}
    for measures in measured(with_loss, traces, torch.device("cpu"), 0):
        reached = np.zeros(measures.n_total)
        reached[measures.token_N] = measures.divergence_N
        ends[measures.trace_id] = np.cumsum(reached) / reached.sum()
    num_tokens = sum(len(trace) for trace in traces)

    def kept(goal: float) -> dict[str, int]:
        return {name: int(np.searchsorted(at, goal)) + 1 for name, at in ends.items()}

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        is_more = sum(kept(middle).values()) > share * num_tokens
        low, high = (low, middle) if is_more else (middle, high)
    chosen = kept(low)
    for trace in traces:
        yield first_part(trace, min(len(trace), chosen[trace.trace_id]))


def write(cache: Cache, out: str, traces: Iterator[Trace]) -> None:
    """Write traces as a sealed cache, unless it is there, and say how many tokens it has."""
    with CacheWriter(out, cache.header, config=cache.manifest.config) as writer:
        if not writer.sealed:
            for trace in traces:
                if trace.trace_id not in writer.finished():
                    writer.append(FinishedTrace(trace, source_hash="rewritten"))
            writer.finish()
    seal_cache(out, known=writer.finished())
    share = sum(t.n_total for t in open_cache(out).infos) / sum(t.n_total for t in cache.infos)
    print(f"{out}: {share:.3f} of the tokens")


def main() -> None:
    match sys.argv[1:]:
        case ["endings", path, out, share]:
            cache = open_cache(path)
            num_closing = len(cache.header.think_close_ids)
            write(cache, out, (with_ending(t, float(share), num_closing) for t in cache))
        case ["gap", path, out, share, student]:
            cache = open_cache(path)
            write(cache, out, cut_at_gap(cache, float(share), student))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
