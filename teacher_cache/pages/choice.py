"""Which traces of a cache a page shows."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from teacher_cache.format import Cache, CachePath, Trace
from teacher_cache.format.reading.places import Place
from teacher_cache.terminal.option import check_options, option

NUM_SHOWN = 10  # traces of a page, unless the user says otherwise


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """`cache-teacher view`."""

    cache: CachePath = option("Folder or URI of the cache, sealed or not.", is_argument=True)
    trace: tuple[str, ...] = option(
        "Id of a trace to show; repeatable.",
        default=(),
        is_repeatable=True,
        can_be_empty=True,
        unset="a sample",
    )
    sample: int | None = option(
        "Number of traces to show, chosen by the hash of their ids.",
        default=None,
        at_least=1,
        unset=f"{NUM_SHOWN}, unless traces are named",
    )
    model: str | None = option(
        "Folder or hub id of the teacher, whose tokenizer turns ids into text.",
        default=None,
        unset="where it was at the capture",
    )
    out: Path = option("Page to write, one HTML file.", letter="o")
    force: bool = option("Overwrite the file if it exists.", default=False)

    def __post_init__(self) -> None:
        check_options(self)
        check_choice(self.trace, self.sample)


def check_choice(trace_ids: Sequence[str], num_sample: int | None) -> None:
    """Refuse both named traces and a sample.

    Raises:
        ValueError: If there are both.
    """
    if trace_ids and num_sample is not None:
        raise ValueError("--sample: traces are named by --trace already; leave one of them out")


@dataclass(frozen=True, eq=False)
class Chosen:
    """Traces for a page, and which they are, in words."""

    traces: Sequence[Trace]
    words: str


def choose(cache: Cache, trace_ids: Sequence[str], num_sample: int) -> Chosen:
    """Read the named traces, in that order, or a sample.

    Raises:
        TraceNotFoundError: If the cache has no such trace.
        CacheFormatError: If a shard is damaged.
        ValueError: If the cache holds no trace at all.
    """
    if not len(cache):
        raise ValueError(f"{cache.path}: no trace is committed yet, so there is nothing to show")
    if trace_ids:
        named = dict.fromkeys(trace_ids)
        read = {trace.trace_id: trace for trace in cache.read_held(map(cache.place, named))}
        return Chosen([read[name] for name in named], f"{len(named):,} chosen traces")
    places = sample_places(cache, num_sample)
    if len(places) == len(cache):
        words = "All traces"
    else:
        words = f"A sample of {len(places):,} traces, by the hash of their ids,"
    return Chosen(list(cache.read_held(places)), words)


def sample_places(cache: Cache, num_traces: int) -> list[Place]:
    """Places of some traces of the whole cache, always the same ones."""

    def key(place: Place) -> bytes:
        shard, row = place
        return hashlib.sha256(cache.shards[shard].traces[row].trace_id.encode()).digest()

    return sorted(sorted(cache.traces, key=key)[:num_traces])
