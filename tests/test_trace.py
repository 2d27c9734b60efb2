"""A trace and a cache as objects: entries of a token, sections, slices, iteration, ids."""

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
from fakes import make_cache, make_trace, make_traces
from hypothesis import given
from hypothesis import strategies as st

from teacher_cache.format import (
    SECTIONS,
    CacheError,
    TraceNotFoundError,
    entry_offsets,
    open_cache,
    row_of_entry,
    tail_mass,
)


@st.composite
def bounded_trace(draw):
    """A trace with gaps without distributions and any bounds."""
    n = draw(st.integers(1, 40))
    gaps = draw(st.sets(st.integers(1, max(1, n - 1)), max_size=5)) if n > 1 else ()
    cot_start, answer_start = sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n))))
    trace = make_trace("some-id", n, seed=draw(st.integers(0, 9)), without_entries=sorted(gaps))
    return replace(trace, cot_start=cot_start, answer_start=answer_start)


@pytest.mark.slow
@given(bounded_trace())
def test_the_entries_of_a_token_and_its_tail_are_a_distribution(trace):
    begin = 0
    for t, k in enumerate(trace.k.tolist()):
        ids, logprobs = trace.logprobs(t)
        assert ids.tolist() == trace.top_ids[begin : begin + k].tolist()
        begin += k
        if k == 0:
            assert len(ids) == len(logprobs) == 0 and np.isnan(trace.tail[t])
            continue
        assert trace.token_ids[t] in ids
        # As SPEC.md puts it: softmax of the kept logits, times what is not the tail.
        kept = np.exp(trace.top_logits[begin - k : begin].astype(float))
        tail = 1 / (1 + np.exp(-float(trace.tail_logit[t])))
        np.testing.assert_allclose(np.exp(logprobs), kept / kept.sum() * (1 - tail), rtol=1e-12)
        np.testing.assert_allclose(trace.tail[t], tail, rtol=1e-12)
    assert begin == trace.num_entries


@given(bounded_trace())
def test_what_is_said_of_all_entries_is_what_is_said_of_each_token(trace):
    one_by_one = [trace.logprobs(t).logprobs for t in range(len(trace))]
    np.testing.assert_array_equal(np.concatenate(one_by_one), trace.top_logprobs)
    counts = np.bincount(trace.token_of_entry, minlength=len(trace))
    np.testing.assert_array_equal(counts, trace.k)
    np.testing.assert_array_equal(np.diff(trace.entry_offsets), trace.k)
    assert (np.diff(trace.token_of_entry) >= 0).all()


@given(bounded_trace())
def test_a_section_is_where_its_bounds_say(trace):
    bounds = [0, trace.cot_start, trace.answer_start, len(trace)]
    for section, begin, end in zip(SECTIONS, bounds, bounds[1:], strict=False):
        assert {trace.section(t) for t in range(begin, end)} <= {section}
    assert [SECTIONS[index] for index in trace.section_of_token] == [
        trace.section(t) for t in range(len(trace))
    ]


@pytest.mark.slow
@given(bounded_trace(), st.data())
def test_a_slice_is_what_a_cache_gives_of_the_first_tokens(trace, data):
    n = data.draw(st.integers(1, len(trace)))
    cut = trace[:n]
    cut.validate()
    assert len(cut) == n and cut.n_total == trace.n_total
    assert (cut.cot_start, cut.answer_start) == (trace.cot_start, trace.answer_start)
    for t in range(n):
        for one, other in zip(cut.logprobs(t), trace.logprobs(t), strict=True):
            np.testing.assert_array_equal(one, other)
        assert cut.section(t) == trace.section(t)
    assert cut.num_entries == sum(trace.k[:n].tolist())


def test_slices_and_places_count_from_the_end_too():
    trace = make_trace("t", 30)
    assert len(trace[:-10]) == len(trace[0:20:1]) == len(trace[:40][:20]) == 20
    np.testing.assert_array_equal(trace.logprobs(-1).ids, trace.logprobs(29).ids)
    assert trace.section(-30) == trace.section(0) == "prompt"


@pytest.mark.parametrize("cut", [slice(0), slice(1, 9), slice(-30), slice(None, 9, 2)])
def test_a_slice_that_is_no_trace_is_refused(cut):
    with pytest.raises(ValueError, match=r"trace 't': expected a slice \[:n\] .* 30 tokens"):
        make_trace("t", 30)[cut]


def test_a_number_is_no_slice_and_a_place_outside_is_said():
    trace = make_trace("t", 30)
    with pytest.raises(TypeError, match=r"trace.logprobs\(3\), its id is trace.token_ids\[3\]"):
        trace[3]
    for t in (30, -31):
        with pytest.raises(IndexError, match=f"trace 't': expected a token of 0 to 29, got {t}"):
            trace.logprobs(t)
        with pytest.raises(IndexError, match="expected a token"):
            trace.section(t)


def test_a_trace_shows_itself_in_a_line():
    trace = make_trace("t", 40)
    entries = f"{trace.num_entries:,} entries"
    assert repr(trace) == f"Trace('t': 40 tokens (prompt 10, cot 20, answer 10), {entries})"
    assert repr(trace[:15]).startswith("Trace('t': 15 of 40 tokens (prompt 10, cot 5, answer 0), ")


def test_ragged_rows():
    k = np.array([0, 3, 0, 2], np.uint8)
    assert entry_offsets(k).tolist() == [0, 0, 3, 3, 5]
    assert row_of_entry(k).tolist() == [1, 1, 1, 3, 3]
    assert entry_offsets(np.full(300, 254, np.uint8))[-1] == 300 * 254  # no uint8 overflows
    assert entry_offsets([]).tolist() == [0] and row_of_entry(k[:0]).tolist() == []


def test_no_tail_logit_overflows():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mass = tail_mass(np.array([-3e38, -4.0, 0.0, 3e38], np.float32))
    np.testing.assert_allclose(mass, [0, 1 / (1 + np.exp(4.0)), 0.5, 1], rtol=1e-12)


@pytest.fixture(scope="module")
def made():
    return make_traces(10)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, made):
    return open_cache(make_cache(tmp_path_factory.mktemp("face") / "cache", made))


def test_a_cache_gives_every_trace_once_and_by_its_id(cache, made):
    assert len(cache) == len(made) == 10
    read = list(cache)
    assert [info.trace_id for info in cache.infos] == [trace.trace_id for trace in read]
    assert {trace.trace_id for trace in read} == {trace.trace_id for trace in made}
    for trace in [*read, *(cache[trace.trace_id] for trace in made)]:
        (original,) = (each for each in made if each.trace_id == trace.trace_id)
        np.testing.assert_array_equal(trace.token_ids, original.token_ids)
        np.testing.assert_array_equal(trace.top_logprobs, original.top_logprobs)
    assert "t3" in cache and "t10" not in cache


def test_iteration_reads_one_shard_at_a_time(cache):
    whole = sum(shard.size_bytes for shard in cache.shards)
    cache.bytes_read = 0
    traces = iter(cache)
    next(traces)
    assert 0 < cache.bytes_read <= cache.shards[0].size_bytes < whole / 2
    list(traces)
    assert cache.bytes_read <= whole  # no shard twice


def test_a_trace_that_is_not_there_is_a_key_error_that_names_others(cache):
    with pytest.raises(TraceNotFoundError) as caught:
        cache["t11"]
    assert isinstance(caught.value, KeyError) and isinstance(caught.value, CacheError)
    assert re.fullmatch(
        r".*cache: no trace 't11' among 10\. Did you mean 't1'.*\?", str(caught.value)
    )
    with pytest.raises(TraceNotFoundError, match=r"Its ids look like 't0', 't1', 't2'\.$"):
        cache["gsm8k"]
    with pytest.raises(TypeError, match="expected the id of a trace, such as 't0', got 0"):
        cache[0]
    with pytest.raises(TypeError, match=r"expected the id of a trace, .* got Trace\('t1': "):
        _ = cache["t1"] in cache  # would be False, though iteration gives it


def test_a_cache_shows_itself_in_a_line(cache, made):
    tokens = sum(len(trace) for trace in made)
    assert repr(cache) == (
        f"Cache({cache.path!r}: 10 traces, {tokens:,} tokens, 3 shards, teacher 'table', sealed)"
    )
