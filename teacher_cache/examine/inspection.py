"""`cache-teacher inspect`: the contents of a cache, in numbers and as text."""

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format import SECTIONS, Cache, CacheHeader, CachePath, NoiseFloor, Trace
from teacher_cache.sources.tokenizer import TeacherTokenizer
from teacher_cache.terminal.option import check_options, option
from teacher_cache.transform.retokenize.certificate import overall

_HISTOGRAM_EDGES = (1, 2, 3, 5, 9, 17, 33, 65, 129, 256)


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """`cache-teacher inspect`."""

    cache: CachePath = option("Folder or URI of the cache, sealed or not.", is_argument=True)
    trace: str | None = option("Id of the trace to show.", default=None, unset="the first trace")
    model: str | None = option(
        "Folder or hub id of the teacher, whose tokenizer turns ids into text.",
        default=None,
        unset="where it was at the capture",
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Inspection:
    """Figures of a whole cache; the histogram is of one shard."""

    sealed: bool
    fingerprint: str
    num_shards: int
    num_traces: int
    num_tokens: int
    num_unfinished: int
    num_tokens_of: Mapping[str, int]  # section -> tokens
    shard_bytes: int
    bytes_per_token: float
    mean_k: float  # over tokens with a distribution, in the shard examined
    k_histogram: Mapping[str, int]  # "5-8" -> tokens
    tail_mass_mean: float
    tail_mass_p99: float
    num_clamped_tails: int
    num_clamped_logits: int
    noise: NoiseFloor | None = None  # as the capture measured it
    retokenized: Mapping[str, float] | None = None  # certificates, if the cache is derived


def inspect_cache(cache: Cache, traces: Mapping[int, Trace]) -> Inspection:
    """Count from the commit records, and measure entries on some traces.

    Args:
        cache: An open cache.
        traces: Whole traces of the cache; `read_first_shard` gives those of one shard.
    """
    infos = cache.infos
    held = [cache.num_held(info) for info in infos]
    before_cot = sum(min(info.cot_start, n) for info, n in zip(infos, held, strict=True))
    before_answer = sum(min(info.answer_start, n) for info, n in zip(infos, held, strict=True))
    counts = (before_cot, before_answer - before_cot, sum(held) - before_answer)
    sections = dict(zip(SECTIONS, counts, strict=True))
    num_tokens = sum(sections.values())
    shard_bytes = sum(shard.size_bytes for shard in cache.shards)
    k = _concatenated([trace.k for trace in traces.values()])
    tail = _concatenated([trace.tail for trace in traces.values()])[k > 0]
    kept = k[k > 0]
    return Inspection(
        sealed=cache.sealed,
        fingerprint=cache.fingerprint,
        num_shards=len(cache.shards),
        num_traces=len(infos),
        num_tokens=num_tokens,
        num_unfinished=sum(info.finish_reason == "length" for info in infos),
        num_tokens_of=sections,
        shard_bytes=shard_bytes,
        bytes_per_token=shard_bytes / max(1, sum(shard.num_tokens for shard in cache.shards)),
        mean_k=float(kept.mean()) if len(kept) else 0.0,
        k_histogram=_histogram(kept),
        tail_mass_mean=float(tail.mean()) if len(tail) else 0.0,
        tail_mass_p99=float(np.quantile(tail, 0.99)) if len(tail) else 0.0,
        num_clamped_tails=sum(shard.num_clamped_tails for shard in cache.shards),
        num_clamped_logits=sum(shard.num_clamped_logits for shard in cache.shards),
        noise=cache.manifest.noise,
        retokenized=None if cache.header.derived is None else overall(infos),
    )


def read_first_shard(cache: Cache) -> dict[int, Trace]:
    """Every trace of the first shard, as far as held; none if the cache is empty."""
    if not cache.shards:
        return {}
    infos = cache.shards[0].traces
    return cache.read(0, {row: cache.num_held(info) for row, info in enumerate(infos)})


@dataclass(frozen=True)
class ShownToken:
    """One token of a trace and the teacher's view of it."""

    position: int
    section: str
    text: str
    probability: float | None  # None if there is no distribution
    alternatives: tuple[tuple[str, float], ...]  # the most probable other tokens
    tail: float | None


def show_tokens(
    trace: Trace, tokenizer: TeacherTokenizer | None, num_alternatives: int = 3
) -> list[ShownToken]:
    """Every token of a trace with its probability and the teacher's alternatives."""

    def text(token_id: int) -> str:
        return str(token_id) if tokenizer is None else tokenizer.decode([token_id])

    shown = []
    for t, token_id in enumerate(trace.token_ids.tolist()):
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
                tail=float(trace.tail[t]) if has_entry else None,
            )
        )
    return shown


def to_json(inspection: Inspection, header: CacheHeader) -> dict[str, Any]:
    """One object with everything, for scripts."""
    return {"header": header.to_json(), **asdict(inspection)}


def _concatenated(parts: list[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0)


def _histogram(kept: NDArray[np.uint8]) -> dict[str, int]:
    counts, _ = np.histogram(kept, bins=_HISTOGRAM_EDGES)
    edges = itertools.pairwise(_HISTOGRAM_EDGES)
    return {
        (f"{low}" if high == low + 1 else f"{low}-{high - 1}"): int(count)
        for (low, high), count in zip(edges, counts, strict=True)
    }
