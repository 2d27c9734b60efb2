"""`cache-teacher inspect`: the contents of a cache, in numbers and as text."""

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from teacher_cache.examine.journalled import Journalled, journalled
from teacher_cache.examine.measured import Measured, measure_entries, section_lengths
from teacher_cache.format import SECTIONS, Cache, CacheHeader, CachePath, NoiseFloor, Trace
from teacher_cache.sources.tokenizer import TeacherTokenizer
from teacher_cache.terminal.option import check_options, option
from teacher_cache.transform.retokenize.certificate import overall

_TO_THE_END = 2**31


def parse_range(text: str) -> tuple[int, int]:
    """First token and end of `100:140`; either may be left out.

    Raises:
        ValueError: If it is no range.
    """
    first, colon, end = text.partition(":")
    try:
        found = (int(first or 0), int(end or _TO_THE_END))
    except ValueError:
        found = (-1, -1)
    if not colon or not 0 <= found[0] < found[1]:
        raise ValueError(f"expected a range of tokens such as 100:140, got {text!r}")
    return found


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """`cache-teacher inspect`."""

    cache: CachePath = option("Folder or URI of the cache, sealed or not.", is_argument=True)
    trace: str | None = option(
        "Id of the trace to show as text.", default=None, unset="the beginning of the first trace"
    )
    tokens: tuple[int, int] | None = option(
        "Range of the trace's tokens to list with their alternatives, such as 100:140; `:` is all.",
        default=None,
        metavar="FIRST:END",
        parse=parse_range,
    )
    shards: int = option(
        "Number of shards to measure entries on, evenly spaced over the cache; 0 for all.",
        default=4,
        at_least=0,
    )
    html: Path | None = option("Also write the figures as a page.", default=None)
    force: bool = option("Overwrite the page if it exists.", default=False)
    model: str | None = option(
        "Folder or hub id of the teacher, whose tokenizer turns ids into text.",
        default=None,
        unset="where it was at the capture",
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Inspection:
    """Figures of a whole cache, and of the entries of some shards."""

    sealed: bool
    fingerprint: str
    num_shards: int
    num_traces: int
    num_tokens: int
    num_unfinished: int
    num_tokens_of: Mapping[str, int]  # section -> tokens
    shard_bytes: int
    bytes_per_token: float
    section_lengths: Mapping[str, Mapping[str, int]]  # section -> "65-128" -> traces
    measured: Measured
    journalled: Journalled | None  # None if sealed, or where journals are elsewhere
    num_clamped_tails: int
    num_clamped_logits: int
    noise: NoiseFloor | None = None  # as the capture measured it
    retokenized: Mapping[str, float] | None = None  # certificates, if the cache is derived


def inspect_cache(cache: Cache, num_shards: int) -> Inspection:
    """Count from the catalogue, and measure entries on some shards.

    Args:
        cache: An open cache.
        num_shards: Number of shards to measure on; 0 for all.

    Raises:
        CacheFormatError: If one of them, or a journal, is damaged.
    """
    catalog, counted = cache.catalog, cache.catalog.counted
    held = catalog.num_held[counted]
    before_cot, before_answer = (
        int(np.minimum(catalog.numbers(name)[counted], held).sum())
        for name in ("cot_start", "answer_start")
    )
    counts = (before_cot, before_answer - before_cot, int(held.sum()) - before_answer)
    sections = dict(zip(SECTIONS, counts, strict=True))
    num_tokens = sum(sections.values())
    shard_bytes = catalog.total("size_bytes")
    return Inspection(
        sealed=cache.sealed,
        fingerprint=cache.fingerprint,
        num_shards=catalog.num_shards,
        num_traces=len(counted),
        num_tokens=num_tokens,
        num_unfinished=catalog.count("finish_reason", "length"),
        num_tokens_of=sections,
        shard_bytes=shard_bytes,
        bytes_per_token=shard_bytes / max(1, catalog.num_tokens),
        section_lengths=section_lengths(cache),
        measured=measure_entries(cache, num_shards),
        journalled=None if cache.sealed else journalled(cache),
        num_clamped_tails=catalog.total("num_clamped_tails"),
        num_clamped_logits=catalog.total("num_clamped_logits"),
        noise=cache.manifest.noise,
        retokenized=None if cache.header.derived is None else overall(cache.infos),
    )


@dataclass(frozen=True)
class ShownToken:
    """One token of a trace and the teacher's view of it."""

    position: int
    section: str
    text: str
    probability: float | None  # None if there is no distribution
    alternatives: tuple[tuple[str, float], ...]  # the most probable other tokens
    tail: float | None  # None likewise, or if the cache does not tell it


def show_tokens(
    trace: Trace,
    tokenizer: TeacherTokenizer | None,
    tokens: tuple[int, int],
    num_alternatives: int = 3,
    *,
    has_tails: bool,
) -> list[ShownToken]:
    """A range of a trace's tokens with their probabilities and the teacher's alternatives."""

    def text(token_id: int) -> str:
        return str(token_id) if tokenizer is None else tokenizer.decode([token_id])

    shown = []
    for t, token_id in itertools.islice(enumerate(trace.token_ids.tolist()), *tokens):
        entries = trace.logprobs(t)
        ids, p = entries.ids.tolist(), np.exp(entries.logprobs).tolist()
        others = [(text(i), q) for i, q in zip(ids, p, strict=True) if i != token_id]
        has_entry = len(ids) > 0
        shown.append(
            ShownToken(
                position=t,
                section=trace.section(t),
                text=text(token_id),
                probability=p[ids.index(token_id)] if has_entry else None,
                alternatives=tuple(others[:num_alternatives]),
                tail=float(trace.tail[t]) if has_entry and has_tails else None,
            )
        )
    return shown


def to_json(inspection: Inspection, header: CacheHeader) -> dict[str, Any]:
    """One object with everything, for scripts."""
    return {"header": header.to_json(), **asdict(inspection)}


def section_texts(trace: Trace, tokenizer: TeacherTokenizer | None) -> dict[str, str]:
    """Section -> its text, or its ids; as far as the trace is held."""
    texts = {}
    for number, name in enumerate(SECTIONS):
        ids = trace.token_ids[trace.section_of_token == number].tolist()
        texts[name] = " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)
    return texts
