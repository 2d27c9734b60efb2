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
follow as they do for one length, to the band. On 100 shards of full size (32 MiB) an epoch of this
mixture reads 0.526 of the bytes, 2.6 points above its mean span: with 20 bands 0.375 reads 0.4 of a
shard. `--num-bands 40` at capture reads 0.506 and costs 0.5 % more bytes in all; so does 0.35 or
0.4. Small shards cost more, since each holds its dictionary: 5 points at 5 MiB, 9 at 1 MiB
(tools/truncation/shard_bytes.py). A fixed span loses the same.

Drawn anew in every epoch, spans were no better (tiny task, two epochs, two seeds: 91.0 and 91.6 %
against 90.8 and 91.0 %), and every shard would be read whole by the end.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from student_train.data.tokens import TokenSelection, TraceBounds
from student_train.data.traces import CacheTraces
from teacher_cache.format import CacheMismatchError, bands_of_tokens, lead_span_lengths
from teacher_cache.format.lead_spans import LeadSpans
from teacher_cache.format.span_draw import MIN_SHARDS_PER_SPAN, deals_shards, drawn_choice


@dataclass(frozen=True)
class DrawnSpans:
    """The selection of every trace of one cache."""

    source: CacheTraces
    selection: TokenSelection  # of one or several lengths
    choice: NDArray[np.int16]  # [rows of the catalogue] index into `selection.choices`
    is_by_shard: bool

    def of(self, shard: int, row: int) -> TokenSelection:
        """The selection of one length for the trace there."""
        index = self.source.cache.catalog.index(shard, row)
        return self.selection.choices[int(self.choice[index])]

    @cached_property
    def bounds(self) -> TraceBounds:
        """Bounds of every trace that is trained on."""
        return TraceBounds.of_places(self.source.cache, self.source.train)

    def each(
        self, figure: Callable[[TokenSelection, TraceBounds], NDArray[np.int64]]
    ) -> NDArray[np.int64]:
        """[n] A figure of every trace that is trained on, from its own selection."""
        choice = self.choice[self.source.train.catalog_rows]
        found = np.zeros(len(choice), np.int64)
        for number, selection in enumerate(self.selection.choices):
            is_it = choice == number
            found[is_it] = figure(selection, self.bounds.where(is_it))
        return found

    @cached_property
    def num_read(self) -> NDArray[np.int64]:
        """[n] Leading tokens that are read of every trace that is trained on."""
        return self.each(lambda selection, bounds: selection.num_read_each(bounds))

    @property
    def num_read_by_row(self) -> NDArray[np.int64]:
        """[rows of the catalogue] `num_read`; 0 for a trace that is not trained on."""
        found = np.zeros(self.source.cache.catalog.num_rows, np.int64)
        found[self.source.train.catalog_rows] = self.num_read
        return found

    @cached_property
    def num_labels(self) -> NDArray[np.int64]:
        """[n] Tokens that are trained on of every trace."""
        return self.each(
            lambda selection, bounds: sum(
                (end - first for first, end in selection.ranges_each(bounds)),
                start=np.zeros_like(bounds.n_total),
            )
        )

    def selects_any(self, sections: tuple[str, ...]) -> bool:
        """Whether a token of these sections of any trace is trained on."""
        narrowed = replace(self, selection=replace(self.selection, sections=sections))
        return bool(narrowed.num_labels.any())

    @property
    def bytes_read(self) -> int:
        """Bytes read in an epoch: each shard's leading bands, as far as one of its traces needs."""
        cache, train = self.source.cache, self.source.train
        held, num_bands = cache.catalog.num_held[train.catalog_rows], cache.header.num_bands
        needed = np.zeros(cache.catalog.num_shards, np.int64)
        np.maximum.at(needed, train.shard, bands_of_tokens(held, self.num_read, num_bands))
        return int(cache.catalog.band_ends[np.arange(len(needed)), needed].sum())

    @property
    def bytes_whole(self) -> int:
        """Bytes of all bands of the same shards."""
        used = np.unique(self.source.train.shard)
        return int(self.source.cache.catalog.band_ends[used, -1].sum())


def draw_spans(source: CacheTraces, selection: TokenSelection, seed: int) -> DrawnSpans:
    """Give every trace of a cache a selection of one length; reads nothing.

    With a single length there is nothing to draw, and a cache that was truncated to the same
    mixture with the same seed has its draw with it.

    Args:
        source: The cache's traces.
        selection: Tokens of each that may be trained on.
        seed: Seed of the run.

    Raises:
        CacheMismatchError: If more is selected than a truncated cache holds.
    """
    catalog, train, lengths = source.cache.catalog, source.train, selection.lengths
    choice = np.zeros(catalog.num_rows, np.int16)
    is_by_shard = deals_shards(train, lengths)
    if _is_held(source, selection, seed):
        is_by_shard = True  # shards are read to their ends, and hold nothing more than is needed
        choice = _held_choice(source, lengths)
    elif len(lengths.lengths) > 1:
        choice[train.catalog_rows] = drawn_choice(catalog, train, lengths, seed)
    drawn = DrawnSpans(source, selection, choice, is_by_shard)
    _check_held(drawn)
    return drawn


def _is_held(source: CacheTraces, selection: TokenSelection, seed: int) -> bool:
    """Whether a truncated cache holds of each trace what this selection would draw."""
    is_lead = selection.loss_on == "lead" and selection.lead_span_of == "trace"
    asked = {"spans": str(selection.lead_span), "seed": seed}
    return is_lead and source.cache.header.lead_spans == asked


def _held_choice(source: CacheTraces, lengths: LeadSpans) -> NDArray[np.int16]:
    """[rows of the catalogue] Index of the length that each trace was truncated to."""
    catalog = source.cache.catalog
    n_total, held = catalog.numbers("n_total"), catalog.num_held
    choice = np.full(catalog.num_rows, len(lengths.lengths) - 1, np.int16)
    for number, length in reversed(list(enumerate(lengths.lengths))):
        choice[lead_span_lengths(n_total, length) == held] = number
    return choice


def _check_held(drawn: DrawnSpans) -> None:
    """Refuse a selection of tokens that a truncated cache lacks, before the first step."""
    cache, train = drawn.source.cache, drawn.source.train
    if not cache.header.is_truncated:
        return
    held = cache.catalog.num_held[train.catalog_rows]
    lacking = np.flatnonzero(drawn.num_read > held)
    if len(lacking):
        first = lacking[0]
        raise CacheMismatchError(
            f"{cache.path}: the cache was truncated to {cache.header.held_part} and holds "
            f"{held[first]:,} tokens of trace {drawn.source.train_infos()[first].trace_id!r}, but "
            f"{drawn.num_read[first]:,} are selected ({drawn.selection}). Train on "
            f"{cache.header.held_options}, or on the cache that it was made from."
        )


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
        """Count them on the catalogues."""
        num_traces = num_whole = num_inside = num_tokens = num_cot = num_cot_trained = 0
        for one in drawn:
            inside, whole = one.each(_num_inside), one.each(TokenSelection.whole)
            num_traces += len(inside)
            num_whole += int((inside == whole).sum())
            num_inside += int(inside.sum())
            num_tokens += int(whole.sum())
            num_cot += int(np.maximum(0, one.bounds.answer_start - _cot_first(one.bounds)).sum())
            num_cot_trained += int(one.each(_num_cot_trained).sum())
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


def _num_inside(selection: TokenSelection, bounds: TraceBounds) -> NDArray[np.int64]:
    first, end = selection.spans(bounds)
    return end - first


def _cot_first(bounds: TraceBounds) -> NDArray[np.int64]:
    return np.maximum(1, bounds.cot_start)


def _num_cot_trained(selection: TokenSelection, bounds: TraceBounds) -> NDArray[np.int64]:
    found = np.zeros_like(bounds.n_total)
    for first, end in selection.ranges_each(bounds):
        inside = np.minimum(end, bounds.answer_start) - np.maximum(first, _cot_first(bounds))
        found += np.maximum(0, inside)
    return found


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
            num_shards = len(np.unique(one.source.train.shard))
            text += (
                f"; {one.source.cache.path} has {num_shards:,} shards, fewer than {needed:,}: its "
                "spans are drawn by trace, and most shards are read as far as their longest one"
            )
    return text
