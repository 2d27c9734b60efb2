"""Figures of the entries of a cache, from all of its shards or from some."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.format import SECTIONS, Cache

_K_EDGES = (1, 2, 3, 5, 9, 17, 33, 65, 129, 256)
_ENTROPY_EDGES = (0, 0.01, 0.05, 0.2, 0.5, 1, 1.5, 2, 3, np.inf)
_TAIL_EDGES = (0, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.2, 0.5, np.inf)


@dataclass(frozen=True)
class Measured:
    """Entries of the tokens that have a distribution, of some shards."""

    num_shards: int
    num_traces: int
    is_all: bool  # whether these are all shards of the cache
    mean_k: float
    k_histogram: Mapping[str, int]  # "5-8" -> tokens
    mean_entropy: float  # nats, the tail counted as one outcome; of unknown ones none is
    entropy_histogram: Mapping[str, int]
    tail_mass_mean: float | None  # None if the cache does not tell its tails
    tail_mass_p99: float | None
    tail_histogram: Mapping[str, int] | None


def measure_entries(cache: Cache, num_shards: int) -> Measured:
    """Read shards evenly spaced over the cache's, one at a time.

    Args:
        cache: An open cache.
        num_shards: Number of shards to read; 0 for all.

    Raises:
        CacheFormatError: If a shard is damaged.
    """
    count = len(cache.shards)
    wanted = min(count, num_shards or count)
    chosen = np.unique(np.linspace(0, count - 1, wanted).round().astype(int)).tolist()
    k: list[NDArray[Any]] = [np.zeros(0)]
    entropy: list[NDArray[Any]] = [np.zeros(0)]
    tail: list[NDArray[Any]] = [np.zeros(0)]
    num_traces = 0
    for shard in chosen:
        infos = cache.shards[shard].traces
        keep = {row: cache.num_held(info) for row, info in enumerate(infos)}
        for trace in cache.read(shard, keep).values():
            num_traces += 1
            has_entries = trace.k > 0
            k.append(trace.k[has_entries])
            entropy.append(trace.entropy[has_entries].astype(np.float32))
            tail.append(trace.tail[has_entries].astype(np.float32))
    all_k, all_entropy, all_tail = (np.concatenate(parts) for parts in (k, entropy, tail))
    has_tails = cache.header.has_tails
    return Measured(
        num_shards=len(chosen),
        num_traces=num_traces,
        is_all=len(chosen) == count,
        mean_k=_mean(all_k),
        k_histogram=histogram(all_k, _K_EDGES, integers=True),
        mean_entropy=_mean(all_entropy),
        entropy_histogram=histogram(all_entropy, _ENTROPY_EDGES),
        tail_mass_mean=_mean(all_tail) if has_tails else None,
        tail_mass_p99=_quantile(all_tail, 0.99) if has_tails else None,
        tail_histogram=histogram(all_tail, _TAIL_EDGES) if has_tails else None,
    )


def section_lengths(cache: Cache) -> dict[str, dict[str, int]]:
    """Section -> number of tokens, in powers of two -> traces; from the catalogue."""
    catalog, counted = cache.catalog, cache.catalog.counted
    held = catalog.num_held[counted]
    cot_start, answer_start = (
        np.minimum(catalog.numbers(name)[counted], held) for name in ("cot_start", "answer_start")
    )
    parts = (cot_start, answer_start - cot_start, held - answer_start)
    longest = max(int(own.max(initial=0)) for own in parts)
    edges = (0, 1, *(2**power for power in range(1, max(2, longest.bit_length() + 1))))
    return {
        name: histogram(own, edges, integers=True)
        for name, own in zip(SECTIONS, parts, strict=True)
    }


def histogram(
    values: NDArray[Any], edges: Sequence[float], *, integers: bool = False
) -> dict[str, int]:
    """Counts between edges, by label; empty bins at either end are left out.

    Labels are "65-128" for integers, else the value at which a bin begins: ">= 0.05".
    """
    counts = np.histogram(values, bins=np.array(edges))[0].tolist()
    labels = [_label(low, high, integers=integers) for low, high in itertools.pairwise(edges)]
    filled = [number for number, count in enumerate(counts) if count]
    inside = range(filled[0], filled[-1] + 1) if filled else range(0)
    return {labels[number]: counts[number] for number in inside}


def _label(low: float, high: float, *, integers: bool) -> str:
    if integers:
        return f"{low}" if high == low + 1 else f"{low}-{int(high) - 1}"
    bound = high if low == 0 else low
    return f"{'<' if low == 0 else '>='} {bound:g}".replace("e-0", "e-")


def _quantile(values: NDArray[Any], share: float) -> float:
    return float(np.quantile(values, share)) if len(values) else 0.0


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else 0.0
