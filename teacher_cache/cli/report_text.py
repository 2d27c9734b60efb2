"""Output of cache-teacher: figures, traces and reports as lines of text."""

import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from teacher_cache.capture.run import CaptureReport
from teacher_cache.examine.audit import Audit, Spread
from teacher_cache.examine.disk_estimate import MIN_TRACES, estimate_disk
from teacher_cache.examine.inspection import Inspection, ShownToken
from teacher_cache.examine.journalled import Journalled
from teacher_cache.examine.plan import Step
from teacher_cache.format import SECTIONS, Cache, InputShare, NoiseFloor, Trace
from teacher_cache.format.checking.findings import Finding, Verification
from teacher_cache.format.checking.repair import Repair
from teacher_cache.pages.numbers import quantity
from teacher_cache.terminal.escape import printable, printable_lines
from teacher_cache.terminal.progress import duration

if TYPE_CHECKING:
    from teacher_cache.transform.importing.run import ImportReport
    from teacher_cache.transform.retokenize.run import RetokenizeReport

_BAR_COLUMNS = 16  # of a histogram beside another, on a terminal of 80
# Facts of a header too long to print, and their units.
_LONG = {"chat_template": "characters or templates", "added_tokens": "tokens"}


def figures_lines(
    figures: Inspection, header: Mapping[str, Any], path: str, *, can_draw: bool
) -> Iterator[str]:
    """Lines of `inspect` about a cache as a whole; see `bar_lines` for `can_draw`."""
    state = "sealed" if figures.sealed else "not complete"
    yield f"{path}: {state}, fingerprint {figures.fingerprint}"
    for name, value in header.items():
        if isinstance(value, Mapping) and name in ("turn_layout", "teacher_settings", "sampling"):
            yield f"  {name}:"
            yield from (f"    {key:20} {printable(item)}" for key, item in value.items())
        elif name in _LONG:
            yield f"  {name:22} {len(value):,} {_LONG[name]} (--json shows them)"
        else:
            yield f"  {name:22} {printable(value)}"
    yield (
        f"\n{figures.num_shards} shards | {figures.num_traces:,} traces "
        f"({figures.num_unfinished:,} cut by length) | {figures.num_tokens:,} tokens | "
        f"{figures.shard_bytes:,} bytes | {figures.bytes_per_token:.1f} bytes/token"
    )
    parts = (f"{name} {count:,}" for name, count in figures.num_tokens_of.items())
    yield f"tokens by section: {', '.join(parts)}"
    if figures.journalled is not None:
        yield _journalled_line(figures.journalled)
    yield (
        f"clamped to what the format holds: {figures.num_clamped_tails:,} tails, "
        f"{figures.num_clamped_logits:,} logits"
    )
    if figures.noise is not None:
        yield f"noise floor, KL: {_spread(figures.noise)} ({_repeated(figures.noise)})"
    if figures.retokenized is not None:
        yield f"carried over: {derived_line(figures.retokenized)}"
    yield from _measured_lines(figures, can_draw=can_draw)


def _journalled_line(found: Journalled) -> str:
    return (
        f"not counted above: {found.num_traces:,} finished traces ({found.num_tokens:,} tokens) in "
        f"the journals of {found.num_workers:,} workers, in no shard yet"
    )


def _measured_lines(figures: Inspection, *, can_draw: bool) -> Iterator[str]:
    found = figures.measured
    which = "every token that has a distribution"
    if not found.is_all:
        which = (
            f"a sample, {found.num_shards:,} of {figures.num_shards:,} shards with "
            f"{found.num_traces:,} traces (--shards 0 for all)"
        )
    yield f"kept entries per token: mean {found.mean_k:.1f}"
    if found.tail_histogram is None:
        yield (
            f"entropy of the kept entries alone: mean {found.mean_entropy:.3f} nats; tail mass: "
            "not known, the rows that were imported do not tell it"
        )
    else:
        yield (
            f"entropy: mean {found.mean_entropy:.3f} nats; tail mass: mean "
            f"{found.tail_mass_mean:.2e}, 99th percentile {found.tail_mass_p99:.2e}"
        )
    yield f"measured on {which}"
    lengths = figures.section_lengths
    for left, right in (
        (("entropy, nats", found.entropy_histogram), ("kept entries", found.k_histogram)),
        (
            ("tail mass", found.tail_histogram or {"not known": 0}),
            ("prompt, tokens of a trace", lengths["prompt"]),
        ),
        (("cot, tokens", lengths["cot"]), ("answer, tokens", lengths["answer"])),
    ):
        yield ""
        columns = (bar_lines(*left, can_draw=can_draw), bar_lines(*right, can_draw=can_draw))
        for one, other in itertools.zip_longest(*columns, fillvalue=""):
            yield f"{one:<39} {other}".rstrip()


def bar_lines(title: str, counts: Mapping[str, int], *, can_draw: bool) -> list[str]:
    """A histogram of at most 39 columns: a title, then a bar for each label.

    Args:
        title: Its heading.
        counts: Label -> count.
        can_draw: Whether the terminal has block characters; # stands for them elsewhere.
    """
    most = max(counts.values(), default=0)
    lines = [title]
    for label, count in counts.items():
        eighths = max(1, round(8 * _BAR_COLUMNS * count / most)) if count else 0
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        if not can_draw:
            bar = "#" * -(-eighths // 8)
        number = f"{count:,}" if count < 1e8 else quantity(count, "")
        lines.append(f"{label:>11} {number:>10} {bar}".rstrip())
    return lines


def trace_lines(trace: Trace, texts: Mapping[str, str], *, limit: int | None) -> Iterator[str]:
    """A trace as text, section by section.

    Args:
        trace: The trace.
        texts: Section -> text.
        limit: Largest number of characters of a section; longer ones lose their middle.
    """
    fields = printable(json.dumps(dict(trace.fields)), 1000)
    yield f"\ntrace {printable(trace.trace_id)} ({trace.finish_reason}) {fields}"
    counts = np.bincount(trace.section_of_token, minlength=len(SECTIONS)).tolist()
    for (name, text), count in zip(texts.items(), counts, strict=True):
        if count:
            yield f"\n-- {name}, {count:,} tokens"
            yield printable_lines(text, limit or len(text))


def token_line(token: ShownToken) -> str:
    """A token, its section and probability, and the teacher's other likely tokens."""
    line = f"{token.position:>5} {token.section:6} {printable(repr(token.text)):16}"
    if token.probability is None:
        return line
    tail = "not known" if token.tail is None else f"{token.tail:.1e}"
    others = "  ".join(f"{printable(repr(text))} {p:.4f}" for text, p in token.alternatives)
    return f"{line} {token.probability:.4f}  tail {tail}  {others}"


def stopped_line(report: CaptureReport, out: str) -> str:
    """Summary after a stop signal."""
    survey = report.survey
    done = survey.num_taken - survey.num_missing + report.num_traces
    return (
        f"stopped: {done:,} of {survey.num_taken:,} traces are kept in {out}; "
        "run the same command again to resume"
    )


def report_line(report: CaptureReport, out: str) -> str:
    """Summary of a capture."""
    survey = report.survey
    if report.sealed:
        state = "complete and sealed"
    elif survey.num_taken < survey.num_wanted:
        state = "not complete yet"
    elif report.part is not None:
        state = _part_state(report.part, report.shares_to_come, out)
    else:
        state = "this worker's part is complete; `cache-teacher seal` closes the cache when all are"
    return (
        f"{out}: {report.num_traces:,} traces captured now ({report.num_tokens:,} tokens, "
        f"{report.num_unfinished:,} cut by length), "
        f"{survey.num_taken - survey.num_missing:,} were already there, "
        f"{survey.num_rejected:,} rows left out; {state}"
    )


def _part_state(part: InputShare, to_come: Sequence[InputShare], out: str) -> str:
    if not to_come:
        return f"part {part} is complete, as are all others: `cache-teacher seal {out}` closes it"
    shown = ", ".join(str(each) for each in to_come[:8]) + (", ..." if len(to_come) > 8 else "")
    return (
        f"part {part} is complete; {len(to_come)} of {part.count} are still to come ({shown}), "
        f"then `cache-teacher seal {out}` closes the cache"
    )


def estimate_line(report: CaptureReport, cache: Cache) -> str:
    """Time and disk for the whole input, estimated from the traces of a trial run."""
    num_wanted, num_traces = report.survey.num_wanted, len(cache)
    rest = "Run again without --limit for the rest."
    disk = estimate_disk(cache)
    if disk is None:
        return (
            f"{num_traces:,} traces are too few to estimate all {num_wanted:,}: use a limit "
            f"of at least {MIN_TRACES}. {rest}"
        )
    lengths = cache.catalog.numbers("n_total")[cache.catalog.counted].tolist()
    # 95 % interval of the traces' lengths: time and disk scale with them.
    error = 1.96 * statistics.stdev(lengths) / len(lengths) ** 0.5 / statistics.mean(lengths)
    whole_s = report.seconds / report.num_traces * num_wanted
    num_tokens = statistics.mean(lengths) * num_wanted
    disk_error = error + disk.token_error_bytes / disk.token_bytes
    return (
        f"estimate for all {num_wanted:,} traces, from {num_traces:,}: "
        f"{duration(whole_s)} (+-{error:.0%}) on this machine after {duration(report.start_s)} of "
        f"starting the teacher; {disk.of(num_tokens) / 1e6:,.1f} MB (+-{disk_error:.0%}), "
        f"{disk.token_bytes:.1f} bytes/token and {disk.shard_bytes / 1e3:,.0f} kB for every "
        f"shard. {rest}"
    )


def imported_line(report: "ImportReport", out: str) -> str:
    """Summary of `import`."""
    if report.stopped_by is not None:
        return (
            f"stopped: {report.num_present + report.num_traces:,} traces are kept in {out}; run "
            "the same command again to resume"
        )
    counts = report.counts
    tail = (
        "tails as the rows tell them"
        if report.meaning.has_tails
        else "tails unknown: train with --tail renormalise"
    )
    return (
        f"{out}: {report.num_traces:,} traces imported now ({counts.num_tokens:,} tokens, "
        f"{counts.num_rows:,} with a distribution; of {counts.num_without_own:,} more the rows "
        f"lack the token itself), {report.num_present:,} were already there, "
        f"{report.rejects.total:,} rows left out; {tail}; sealed"
    )


def retokenized_lines(report: "RetokenizeReport", out: str) -> Iterator[str]:
    """Summary of `retokenize`, with quality figures."""
    if report.stopped_by is not None:
        yield (
            f"stopped: {report.num_present + report.num_traces:,} traces are kept in {out}; run "
            "the same command again to resume"
        )
        return
    yield (
        f"{out}: {report.num_traces:,} traces carried over now ({report.num_tokens:,} tokens), "
        f"{report.num_present:,} were already there, {report.rejects.total:,} left out; sealed"
    )
    if report.figures is not None:
        yield derived_line(report.figures)


def derived_line(figures: Mapping[str, float]) -> str:
    """Quality of a derived cache's distributions."""
    return (
        f"{figures['coverage']:.2%} of the responses' tokens have a distribution; chain-rule error "
        f"{figures['chain_rule_error']:.2g} nats/token (largest of a trace "
        f"{figures['largest_chain_rule_error']:.2g}), mass shared with other tokens of the teacher "
        f"{figures['shared_nats_per_token']:.2g} nats/token, mean tail {figures['tail_mass']:.2g}"
    )


def finding_line(finding: Finding) -> str:
    """One finding about a cache, with its file."""
    return f"{printable(finding.file)}: {printable(finding.text, 1000)}"


def verified_line(found: Verification) -> str:
    """Summary of a check and its verdict."""
    state = "sealed" if found.sealed else "not sealed"
    copies = f" (and {found.num_duplicates:,} copies)" if found.num_duplicates else ""
    waiting = f", {found.num_journalled:,} traces in journals" if found.num_journalled else ""
    num_errors = len(found.errors)
    verdict = f"{num_errors:,} errors" if num_errors else "no errors"
    return (
        f"{found.path}: {state}, {found.num_shards:,} shards, {found.num_traces:,} traces{copies}, "
        f"{found.num_tokens:,} tokens, {found.num_entries:,} entries, {found.num_bytes:,} bytes "
        f"checked{waiting}; {verdict}"
    )


def repair_lines(repair: Repair, path: str) -> Iterator[str]:
    """Summary of a repair, and what to do next."""
    if repair.has_new_catalog:
        yield f"{path}: catalog.parquet made again from the commit records; the seal stays"
        return
    for file, target in repair.removed.items():
        yield f"{printable(file)}: {'kept as' if file == 'cache.json' else 'moved to'} {target}"
    if repair.has_manifest:
        yield f"{path}: no longer sealed"
    else:
        yield f"{path}: has no cache.json now: it was damaged, and no shard has its contents"
    yield (
        "now run the command that made this cache again (of every worker, if several shared the "
        "input): it captures what is missing and seals the cache. If that is impossible, "
        "`cache-teacher seal` declares it complete without these traces"
    )


def audit_lines(found: Audit) -> Iterator[str]:
    """Figures of an audit, and its verdict."""
    yield (
        f"{found.cache}: {found.num_tokens:,} tokens of {found.num_traces:,} traces scored again "
        f"by {found.engine} {found.engine_version} ({found.dtype}); nats per token"
    )
    yield f"KL, stored to live     {_spread(found.kl)}"
    yield f"of it, by storing      {_spread(found.rounding)}"
    yield f"KL, live to live again {_spread(found.noise)}  ({found.noise_from})"
    floor = found.noise_floor
    if floor is None:
        yield "noise at the capture   not kept (it is measured at the end, and kept with the seal)"
    else:
        yield f"noise at the capture   {_spread(floor)}  ({_repeated(floor)})"
    yield (
        f"stored to live is {found.times_the_floor:.3g} times what storing and the larger noise "
        "account for"
    )
    yield (
        f"mean KL to the rows before and after: {found.kl_if_moved[-1]:.3g}, "
        f"{found.kl_if_moved[1]:.3g}; worst: token {found.worst_token} of "
        f"{printable(found.worst_trace)}"
    )
    least = "" if found.live_width == found.vocab_size else "at least "
    yield (
        f"lost by keeping top-k: {least}{found.cut_by_top_k:.2e}, by the mass cut: "
        f"{found.cut_by_mass:.2e} (dropped ids sharing the tail evenly; {found.live_width:,} of "
        f"{found.vocab_size:,} ids per token compared)"
    )
    yield (
        f"same most probable token: {found.top1_agreement:.2%} | teacher's NLL of these traces: "
        f"stored {found.nll_stored:.4f}, live {found.nll_live:.4f}"
    )
    if found.num_outside:
        yield f"{found.num_outside:,} stored entries are beyond the engine's {found.live_width:,}"
    verdict = "passed" if found.passed else "FAILED"
    yield f"{verdict}: mean KL {found.kl.mean:.2e}, at most {found.max_kl:g} allowed"


def _repeated(floor: NoiseFloor) -> str:
    return f"{floor.num_tokens:,} tokens of {floor.num_traces:,} traces in another batch"


def _spread(spread: Spread | NoiseFloor) -> str:
    return f"mean {spread.mean:.2e}  99th percentile {spread.p99:.2e}  max {spread.max:.2e}"


def step_line(step: Step) -> str:
    """One figure of a plan and its arithmetic."""
    return f"{step.name:32} {_amount(step.value, step.unit):>18}  = {step.how}"


def _amount(value: float, unit: str) -> str:
    """A readable number with its unit: 12.3 GB, 4,200, 0.82."""
    if unit in ("bytes", "FLOPs"):
        for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
            if value >= 10**power:
                return f"{value / 10**power:,.1f} {prefix}{'B' if unit == 'bytes' else 'FLOP'}"
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.3g}"
    return f"{number} {unit}".rstrip()
