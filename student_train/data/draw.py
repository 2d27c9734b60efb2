"""Draw of a lead span for every trace of a cache from a mixture, once, from the run's seed.

The draw is balanced: the traces are ordered by hash, and the mixture's shares are laid over their
tokens in that order. A trace has the same span in every epoch, whatever the number of processes,
the size of a batch, and the step at which a run is resumed.

Where a cache has enough shards, the shards are dealt instead, so that each is read whole or to one
shorter prefix: a trace that is needed whole costs the whole shard that holds it. Neighbours in
a shard then have the same span: shuffle prompts that are sorted by topic before capturing them.

Largest distance of the mean span of 0.375:4,1:1 from 0.5 in 200 seeds, where shards have between
half and one and a half times their mean size: 0.022 with 20 shards, 0.009 with 50, 0.004 with 100.
Drawn by trace, with lengths as uneven as those of reasoning traces: 0.003 with 1,000 traces. Bytes
follow as they do for one length, to the band: on 100 shards 0.538 of them where a fixed 0.5 reads
0.519. With 20 bands 0.375 reads 0.4 of a shard, which is those 0.02; 0.35 or 0.4 lose nothing. The
rest a fixed span has too: bands cost something each, and early ones may hold more entries (tiny
teacher, unsure of its prompts, 50 shards: 0.609 at 0.5, 0.625 for the mixture, 0.594 with 0.35).

Drawn anew in every epoch, spans were no better (tiny task, two epochs, two seeds: 91.0 and 91.6 %
against 90.8 and 91.0 %), and every shard would be read whole by the end.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from student_train.data.lead_spans import LeadSpans
from student_train.data.tokens import TokenSelection
from student_train.data.traces import CacheTraces
from teacher_cache.format import CacheMismatchError, TraceInfo, num_bands_needed

# Shards for the rarest span: fewer would teach a length on too narrow a part of the data.
MIN_SHARDS_PER_SPAN = 4


@dataclass(frozen=True)
class DrawnSpans:
    """The selection of every trace of one cache."""

    source: CacheTraces
    selection: TokenSelection  # of one or several lengths
    choice: tuple[NDArray[np.int16], ...]  # per shard, [rows] index into `selection.choices`
    is_by_shard: bool

    def of(self, shard: int, row: int) -> TokenSelection:
        """The selection of one length for the trace there."""
        return self.selection.choices[int(self.choice[shard][row])]

    def __iter__(self) -> Iterator[tuple[TraceInfo, TokenSelection]]:
        """Every trace that is trained on, and its selection."""
        for shard, row in self.source.train:
            yield self.source.cache.shards[shard].traces[row], self.of(shard, row)

    def selects_any(self, sections: tuple[str, ...]) -> bool:
        """Whether a token of these sections of any trace is trained on."""
        narrowed = replace(self, selection=replace(self.selection, sections=sections))
        return any(selection.ranges(info) for info, selection in narrowed)

    @property
    def bytes_read(self) -> int:
        """Bytes read in an epoch: each shard's leading bands, as far as one of its traces needs."""
        keep: dict[int, list[tuple[int, int]]] = {}
        for (shard, _), (info, selection) in zip(self.source.train, self, strict=True):
            pair = self.source.cache.num_held(info), selection.num_read(info)
            keep.setdefault(shard, []).append(pair)
        shards = self.source.cache.shards
        return sum(
            shards[shard].prefix_bytes(num_bands_needed(pairs, len(shards[shard].blocks)))
            for shard, pairs in keep.items()
        )

    @property
    def bytes_whole(self) -> int:
        """Bytes of all bands of the same shards."""
        shards = self.source.cache.shards
        used = {shard for shard, _ in self.source.train}
        return sum(shards[shard].prefix_bytes(len(shards[shard].blocks)) for shard in used)


def draw_spans(source: CacheTraces, selection: TokenSelection, seed: int) -> DrawnSpans:
    """Give every trace of a cache a selection of one length; reads nothing.

    With a single length there is nothing to draw. In a mixture each length gets its share of the
    tokens to within one trace, or to within one shard where shards are dealt.

    Args:
        source: The cache's traces.
        selection: Tokens of each that may be trained on.
        seed: Seed of the run.

    Raises:
        CacheMismatchError: If more is selected than a truncated cache holds.
    """
    shards, infos, lengths = source.cache.shards, source.train_infos(), selection.lengths
    num_tokens: dict[int, int] = {}  # by shard that is trained on
    for (shard, _), info in zip(source.train, infos, strict=True):
        num_tokens[shard] = num_tokens.get(shard, 0) + info.n_total
    is_by_shard = len(num_tokens) * min(lengths.shares) >= MIN_SHARDS_PER_SPAN
    choice = tuple(np.zeros(len(shard.traces), np.int16) for shard in shards)
    if len(lengths.lengths) > 1 and is_by_shard:
        names = [shards[shard].name for shard in num_tokens]
        dealt = _dealt(names, list(num_tokens.values()), lengths, seed)
        for shard, index in zip(num_tokens, dealt, strict=True):
            choice[shard][:] = index
    elif len(lengths.lengths) > 1:
        dealt = _dealt([t.trace_id for t in infos], [t.n_total for t in infos], lengths, seed)
        for (shard, row), index in zip(source.train, dealt, strict=True):
            choice[shard][row] = index
    drawn = DrawnSpans(source, selection, choice, is_by_shard)
    _check_held(drawn)
    return drawn


def _check_held(drawn: DrawnSpans) -> None:
    """Refuse a selection of tokens that a truncated cache lacks, before the first step."""
    cache = drawn.source.cache
    if cache.header.max_lead_span == 1.0:
        return
    for info, selection in drawn:
        held, needed = cache.num_held(info), selection.num_read(info)
        if needed > held:
            raise CacheMismatchError(
                f"{cache.path}: the cache was truncated to a lead span of "
                f"{cache.header.max_lead_span:g} and holds {held:,} tokens of trace "
                f"{info.trace_id!r}, but {needed:,} are selected ({drawn.selection}). Train on at "
                "most this lead span, or on the cache that it was made from."
            )


def _dealt(
    names: Sequence[str], num_tokens: Sequence[int], lengths: LeadSpans, seed: int
) -> list[int]:
    """Index of each one's length: where its middle lies among all tokens, in hash order."""
    keys = [hashlib.sha256(f"lead-span/{seed}/{name}".encode()).digest() for name in names]
    order = sorted(range(len(names)), key=keys.__getitem__)
    total, before = sum(num_tokens), 0
    index = [0] * len(names)
    for place in order:
        index[place] = lengths.index_at((before + num_tokens[place] / 2) / total)
        before += num_tokens[place]
    return index


@dataclass(frozen=True)
class SpanFigures:
    """Figures of a run's draw over all of its caches; an epoch's traces, each once."""

    num_traces: int
    num_whole_traces: int
    mean_lead_span: float  # share of the tokens that are inside the spans
    cot_share: float  # share of the chains of thought's tokens that are trained on; 0 without any
    byte_share: float  # share of the shards' bytes that an epoch reads

    @classmethod
    def of(cls, drawn: Sequence[DrawnSpans]) -> "SpanFigures":
        """Count them on the commit records."""
        num_traces = num_whole = num_inside = num_tokens = num_cot = num_cot_trained = 0
        for info, selection in (pair for one in drawn for pair in one):
            first, end = selection.span(info)
            whole = selection.whole(info)
            num_traces += 1
            num_whole += end - first == whole
            num_inside += end - first
            num_tokens += whole
            cot_first, cot_end = max(1, info.cot_start), info.answer_start
            num_cot += max(0, cot_end - cot_first)
            for left, right in selection.ranges(info):
                num_cot_trained += max(0, min(right, cot_end) - max(left, cot_first))
        return cls(
            num_traces,
            num_whole,
            num_inside / max(1, num_tokens),
            num_cot_trained / max(1, num_cot),
            sum(one.bytes_read for one in drawn) / sum(one.bytes_whole for one in drawn),
        )

    @property
    def whole_trace_share(self) -> float:
        """Share of the traces that are not cut."""
        return self.num_whole_traces / self.num_traces


def described(drawn: Sequence[DrawnSpans], figures: SpanFigures) -> str:
    """One line on the selection and, for a mixture, on the result of its draw."""
    selection = drawn[0].selection
    text = f"{selection}: {100 * figures.cot_share:.1f} % of the chains of thought"
    if len(selection.choices) == 1:
        return text
    text += (
        f"; mean lead span {figures.mean_lead_span:.3f}, {100 * figures.whole_trace_share:.1f} % "
        f"of the traces whole, {100 * figures.byte_share:.1f} % of the bytes read"
    )
    needed = math.ceil(MIN_SHARDS_PER_SPAN / min(selection.lengths.shares))
    for one in drawn:
        if not one.is_by_shard:
            num_shards = len({shard for shard, _ in one.source.train})
            text += (
                f"; {one.source.cache.path} has {num_shards:,} shards, fewer than {needed:,}: its "
                "spans are drawn by trace, and most shards are read as far as their longest one"
            )
    return text
