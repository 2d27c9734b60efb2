"""Mixtures of lead spans: what they say, who gets which, and what is read for it."""

from dataclasses import replace

import numpy as np
import pytest
from fakes import make_cache, make_traces
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.data.draw import SpanFigures, described, draw_spans
from student_train.data.stream import Cursor, TraceStream
from student_train.data.tokens import TokenSelection
from student_train.data.traces import open_data
from teacher_cache.format import CacheMismatchError, open_cache
from teacher_cache.format.lead_spans import LeadSpans
from teacher_cache.transform.truncate import truncate_cache

FIFTH_WHOLE = LeadSpans((0.375, 1.0), (4.0, 1.0))
MIXED = TokenSelection(FIFTH_WHOLE)

spans = st.lists(st.integers(1, 1000), min_size=1, max_size=6, unique=True).flatmap(
    lambda thousandths: st.lists(
        st.integers(1, 9), min_size=len(thousandths), max_size=len(thousandths)
    ).map(
        lambda weights: LeadSpans(
            tuple(n / 1000 for n in sorted(thousandths)), tuple(map(float, weights))
        )
    )
)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """3 shards of 20 traces."""
    path = make_cache(
        tmp_path_factory.mktemp("few") / "cache", make_traces(60), traces_per_shard=20
    )
    return open_data([path])


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """100 shards of 2 traces."""
    folder = tmp_path_factory.mktemp("many")
    return open_data([make_cache(folder / "cache", make_traces(200), traces_per_shard=2)])


def steps_of(data, selection=MIXED, **changes):
    arguments = {"batch_traces": 4, "num_epochs": 2, "seed": 3} | changes
    with TraceStream(data, selection, **arguments) as stream:
        return list(stream)


def spans_of(steps):
    """The lead span of every trace in every epoch."""
    return {
        (step.epoch, item.trace.trace_id): item.selection.lead_span
        for step in steps
        for item in step.traces
    }


def test_a_mixture_is_read_as_it_is_written():
    assert LeadSpans.parse("0.375:4,1:1") == LeadSpans.parse(" 1 , .375:4.0") == FIFTH_WHOLE
    assert str(FIFTH_WHOLE) == "0.375:4,1:1"
    assert FIFTH_WHOLE.mean == pytest.approx(0.5)
    assert FIFTH_WHOLE.shares == (0.8, 0.2)


@given(spans)
def test_a_mixture_survives_being_written(mixture):
    assert LeadSpans.parse(str(mixture)) == mixture


@pytest.mark.parametrize(
    "text", ["", "half", "0.5:", "0.5:x", "0.5:0", "0.5:-1", "0.5:nan", "0.5,0.5", "0.5;1", "1:2:3"]
)
def test_what_is_no_mixture_is_refused(text):
    if text == "0.5:":  # a weight that is left out is 1
        assert LeadSpans.parse(text) == LeadSpans((0.5,), (1.0,))
        return
    with pytest.raises(ValueError, match="expected"):
        LeadSpans.parse(text)


@pytest.mark.parametrize(
    "options",
    [
        {"lead_span": LeadSpans.parse("0.5,1.5")},
        {"lead_span": LeadSpans.parse("0,1")},
        {"trace_tokens": LeadSpans.parse("3.5,7")},
        {"trace_tokens": LeadSpans.parse("0,7")},
        {"lead_span": FIFTH_WHOLE, "trace_tokens": 7},
    ],
)
def test_lengths_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match=r"--lead-span|--trace-tokens"):
        TokenSelection(**options)


def test_a_mixture_says_what_it_is_and_has_no_tokens_of_its_own(few):
    assert str(MIXED) == (
        "the first 0.375 of 80 % and 1 of 20 % of the traces, sections prompt, cot, answer"
    )
    budgets = TokenSelection(trace_tokens=LeadSpans.parse("1000:1,20:3"))
    assert str(budgets).startswith("the first 20 tokens of 75 % and 1,000 tokens of 25 % of the tr")
    with pytest.raises(TypeError, match="one length"):
        MIXED.ranges(few.sources[0].train_infos()[0])


@given(mixture=spans, seed=st.integers(0, 5))
def test_every_length_gets_its_share_of_the_tokens(few, mixture, seed):
    (source,) = few.sources
    drawn = draw_spans(source, TokenSelection(mixture), seed)
    tokens = dict.fromkeys(mixture.lengths, 0)
    for place, info in zip(source.train, source.train_infos(), strict=True):
        tokens[drawn.of(*place).lead_span] += info.n_total
    total = sum(tokens.values())
    # To within a trace, or a shard where shards are dealt; each border is shared by two lengths.
    largest = 24 * 60 if drawn.is_by_shard else 60
    for count, share in zip(tokens.values(), mixture.shares, strict=True):
        assert abs(count - share * total) <= largest


def spans_by_id(source, seed):
    drawn = draw_spans(source, MIXED, seed)
    pairs = zip(source.train, source.train_infos(), strict=True)
    return {info.trace_id: drawn.of(*place).lead_span for place, info in pairs}


def test_a_draw_depends_on_the_seed_and_the_ids_alone(few, tmp_path):
    (source,) = few.sources
    moved = make_cache(tmp_path / "cache", make_traces(60)[::-1], traces_per_shard=60)
    (other,) = open_data([moved]).sources

    assert spans_by_id(other, 3) == spans_by_id(source, 3)
    assert spans_by_id(source, 4) != spans_by_id(source, 3)


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(
    batch_traces=st.integers(1, 9),
    num_ranks=st.sampled_from([1, 2, 4]),
    stop=st.integers(0, 20),
)
def test_neither_processes_nor_batches_nor_continuing_move_a_span(
    few, batch_traces, num_ranks, stop
):
    whole = spans_of(steps_of(few))
    found = {}
    for rank in range(num_ranks):
        begun = steps_of(few, batch_traces=batch_traces, rank=rank, num_ranks=num_ranks)[:stop]
        cursor = begun[-1].cursor if begun else Cursor()
        rest = steps_of(
            few, batch_traces=batch_traces, rank=rank, num_ranks=num_ranks, cursor=cursor
        )
        found |= spans_of([*begun, *rest])
    assert found == whole


def test_a_span_stays_with_its_trace_and_is_what_is_read(few):
    steps = steps_of(few)
    by_epoch = spans_of(steps)
    for epoch, trace_id in by_epoch:
        assert by_epoch[epoch, trace_id] == by_epoch[0, trace_id]
    for step in steps:
        for item in step.traces:
            assert len(item.trace.token_ids) == item.selection.num_read(item.trace)
    assert set(by_epoch.values()) == {0.375, 1.0}


def test_a_steps_traces_do_not_depend_on_the_mixture(few):
    ids = [step.trace_ids for step in steps_of(few)]
    assert ids == [step.trace_ids for step in steps_of(few, TokenSelection())]


def test_a_single_length_is_the_same_however_it_is_written(few):
    (source,) = few.sources
    one = draw_spans(source, TokenSelection(0.5), 0)
    other = draw_spans(source, TokenSelection(LeadSpans.parse("0.5:7")), 0)
    assert one.num_read.tolist() == other.num_read.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_bytes_follow_where_there_are_shards_enough(many, seed):
    (source,) = many.sources
    drawn = draw_spans(source, MIXED, seed)
    figures = SpanFigures.of([drawn])

    assert drawn.is_by_shard
    for shard in range(len(source.cache.shards)):
        assert len({drawn.of(shard, row) for row in range(2)}) == 1
    assert figures.mean_lead_span == pytest.approx(0.5, abs=0.03)
    assert figures.byte_share == pytest.approx(
        # What the same two spans cost by themselves, bands and dictionaries included.
        np.average(
            [
                SpanFigures.of([draw_spans(source, choice, seed)]).byte_share
                for choice in MIXED.choices
            ],
            weights=FIFTH_WHOLE.shares,
        ),
        abs=0.03,
    )
    before = source.cache.bytes_read
    steps_of(many, num_epochs=1, seed=seed)
    assert source.cache.bytes_read - before == drawn.bytes_read


def test_where_there_are_not_the_bytes_are_said(few):
    drawn = [draw_spans(source, MIXED, 0) for source in few.sources]
    figures = SpanFigures.of(drawn)

    assert figures.mean_lead_span == pytest.approx(0.5, abs=0.03)
    assert figures.whole_trace_share == pytest.approx(0.2, abs=0.03)
    assert figures.byte_share == 1.0
    assert "3 shards, fewer than 20" in described(drawn, figures)
    assert "100.0 % of the bytes" in described(drawn, figures)


def test_a_span_that_a_truncated_cache_lacks_is_refused_before_anything_is_read(few, tmp_path):
    path = str(tmp_path / "half")
    truncate_cache(few.sources[0].cache, path, lead_span=0.5)
    (half,) = open_data([path]).sources

    with pytest.raises(CacheMismatchError, match=r"truncated to a lead span of 0\.5"):
        draw_spans(half, MIXED, 0)
    draw_spans(half, TokenSelection(LeadSpans.parse("0.25,0.5")), 0)
    assert open_cache(path).bytes_read == 0


def test_held_out_traces_do_not_count(few):
    (source,) = few.sources
    some = replace(source, train=source.train[:7], heldout=source.train[7:])
    figures = SpanFigures.of([draw_spans(some, MIXED, 0)])
    assert figures.num_traces == 7
