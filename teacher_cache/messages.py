"""What cache-teacher tells people: figures, traces and reports as lines of text."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from teacher_cache.capture import CaptureReport
from teacher_cache.format import Cache
from teacher_cache.inspection import Inspection, ShownToken


def figures_lines(figures: Inspection, header: Mapping[str, Any], path: str) -> Iterator[str]:
    """Everything that `inspect` says of a cache as a whole."""
    state = "sealed" if figures.sealed else "not complete"
    yield f"{path}: {state}, fingerprint {figures.fingerprint}"
    for name, value in header.items():
        yield f"  {name:22} {value}"
    yield (
        f"\n{figures.num_shards} shards | {figures.num_traces:,} traces "
        f"({figures.num_unfinished:,} cut by length) | {figures.num_tokens:,} tokens | "
        f"{figures.shard_bytes:,} bytes | {figures.bytes_per_token:.1f} bytes/token"
    )
    parts = (f"{name} {count:,}" for name, count in figures.num_tokens_of.items())
    yield f"tokens by section: {', '.join(parts)}"
    yield (
        f"tail mass: mean {figures.tail_mass_mean:.2e}, 99th percentile "
        f"{figures.tail_mass_p99:.2e}; {figures.num_clamped_tails:,} tails and "
        f"{figures.num_clamped_logits:,} logits clamped"
    )
    yield f"kept entries per token: mean {figures.mean_k:.1f}"
    most = max(figures.k_histogram.values(), default=0)
    for label, count in figures.k_histogram.items():
        if count:
            yield f"  {label:>8} {count:>10,} {'#' * max(1, round(40 * count / most))}"


def token_line(token: ShownToken) -> str:
    """A token, its section and probability, and what else the teacher thought likely."""
    line = f"{token.position:>5} {token.section:6} {token.text!r:16}"
    if token.probability is None:
        return line
    others = "  ".join(f"{text!r} {p:.4f}" for text, p in token.alternatives)
    return f"{line} {token.probability:.4f}  tail {token.tail:.1e}  {others}"


def stopped_line(report: CaptureReport, out: Path) -> str:
    """What a stop signal left behind."""
    survey = report.survey
    done = survey.num_taken - survey.num_missing + report.num_traces
    return (
        f"stopped: {done:,} of {survey.num_taken:,} traces are kept in {out}; "
        "run the same command again to go on"
    )


def report_line(report: CaptureReport, out: Path) -> str:
    """What a capture did."""
    survey = report.survey
    if report.sealed:
        state = "complete and sealed"
    elif survey.num_taken < survey.num_wanted:
        state = "not complete yet"
    else:
        state = "this worker's part is complete; `cache-teacher seal` closes the cache when all are"
    return (
        f"{out}: {report.num_traces:,} traces captured now ({report.num_tokens:,} tokens, "
        f"{report.num_unfinished:,} cut by length), "
        f"{survey.num_taken - survey.num_missing:,} were there, "
        f"{survey.num_bad_lines:,} lines left out; {state}"
    )


def estimate_line(report: CaptureReport, cache: Cache) -> str:
    """Time and disk of the whole input, from the traces of a trial run."""
    num_wanted = report.survey.num_wanted
    stored_bytes = sum(shard.size_bytes for shard in cache.shards)
    whole_bytes = stored_bytes / len(cache.traces) * num_wanted
    whole_s = report.seconds / report.num_traces * num_wanted
    return (
        f"estimate for all {num_wanted:,} traces, from {report.num_traces:,}: "
        f"{_duration(whole_s)} on this machine, {whole_bytes / 1e6:,.1f} MB "
        f"({stored_bytes / sum(shard.num_tokens for shard in cache.shards):.1f} bytes/token). "
        "Run again without --limit for the rest."
    )


def _duration(seconds: float) -> str:
    for unit, length_s in (("h", 3600), ("min", 60)):
        if seconds >= length_s:
            return f"{seconds / length_s:.1f} {unit}"
    return f"{seconds:.0f} s"
