"""Traces through the cache and back: exact, but for the grid and the tail's floor."""

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from caches import ARRAYS, VOCAB_SIZE, assert_same, logits_rows, read_all, write
from fakes import make_header
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from teacher_cache.format import (
    LOGIT_GRID,
    MAX_K,
    TAIL_FLOOR,
    CacheWriter,
    FinishedTrace,
    KeepPolicy,
    Trace,
    keep_entries,
    lead_span_length,
    num_bands_needed,
    open_cache,
    stored_logprobs,
)
from teacher_cache.format.bands import band_start
from teacher_cache.format.codec import round_to_bfloat16


@st.composite
def any_trace(draw, trace_id="t"):
    """A trace of any shape: any k up to the widest, gaps without distributions, any bounds."""
    n_total = draw(st.integers(1, 60))
    seed = draw(st.integers(0, 2**32 - 1))
    widest = draw(st.sampled_from([1, 2, 15, MAX_K + 1]))
    rng = np.random.default_rng(seed)
    token_ids = rng.integers(0, VOCAB_SIZE, n_total).astype(np.int32)
    k = rng.integers(0, widest + 1, n_total).astype(np.uint8)
    k[0] = 0
    top_ids, top_logits = [], []
    for token_id, kept in zip(token_ids, k, strict=True):
        others = rng.permutation(np.delete(np.arange(VOCAB_SIZE), token_id))[:kept]
        if kept:
            others[rng.integers(kept)] = token_id
        top_ids.append(others)
        codes = np.sort(rng.integers(0, len(LOGIT_GRID), kept))
        codes[:1] = 0
        top_logits.append(LOGIT_GRID[codes])
    cot_start = draw(st.integers(0, n_total))
    tail = rng.normal(0, 8, n_total).astype(np.float32)
    return Trace(
        trace_id=trace_id,
        token_ids=token_ids,
        n_total=n_total,
        cot_start=cot_start,
        answer_start=draw(st.integers(cot_start, n_total)),
        k=k,
        top_ids=np.concatenate(top_ids).astype(np.int32),
        top_logits=np.concatenate(top_logits).astype(np.float32),
        tail_logit=np.where(k > 0, round_to_bfloat16(tail), 0).astype(np.float32),
        finish_reason=draw(st.sampled_from(["stop", "length", "scored"])),
        fields=draw(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2)),
    )


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(
    traces=st.lists(any_trace(), min_size=1, max_size=5),
    num_bands=st.sampled_from([1, 3, 20]),
)
def test_a_trace_comes_back_as_it_was_written(tmp_path_factory, traces, num_bands):
    named = [Trace(**{**vars(t), "trace_id": f"t{i}"}) for i, t in enumerate(traces)]
    cache = write(tmp_path_factory.mktemp("round") / "cache", named, num_bands=num_bands)
    found = read_all(cache)
    assert set(found) == {trace.trace_id for trace in named}
    for trace in named:
        found[trace.trace_id].validate()
        assert_same(trace, found[trace.trace_id])


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(
    traces=st.lists(any_trace(), min_size=1, max_size=4),
    lead_span=st.floats(0.01, 1.0),
    num_bands=st.sampled_from([1, 7, 20]),
)
def test_a_lead_span_reads_the_beginning_of_every_trace_and_no_more(
    tmp_path_factory, traces, lead_span, num_bands
):
    named = [Trace(**{**vars(t), "trace_id": f"t{i}"}) for i, t in enumerate(traces)]
    cache = write(tmp_path_factory.mktemp("span") / "cache", named, num_bands=num_bands)
    spans = [(t.n_total, lead_span_length(t.n_total, lead_span)) for t in named]
    found = read_all(cache, lead_span)
    assert cache.bytes_read == cache.shards[0].prefix_bytes(num_bands_needed(spans, num_bands))
    for whole, (_, keep) in zip(named, spans, strict=True):
        part = found[whole.trace_id]
        num_entries = int(whole.k[:keep].sum(dtype=int))
        assert len(part.token_ids) == keep
        assert part.n_total == whole.n_total
        for name in ("token_ids", "k", "tail_logit"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[:keep])
        for name in ("top_ids", "top_logits"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[:num_entries])


@given(n_total=st.integers(1, 5000), twentieth=st.integers(1, 20))
def test_a_lead_span_needs_no_band_beyond_its_share(n_total, twentieth):
    keep = lead_span_length(n_total, twentieth / 20)
    assert keep == max(1, n_total * twentieth // 20)
    needed = num_bands_needed([(n_total, keep)], 20)
    assert band_start(n_total, needed, 20) >= keep
    assert needed == 0 or band_start(n_total, needed - 1, 20) < keep
    if n_total >= 20:
        assert needed <= twentieth


def test_a_lead_span_counts_as_the_decimal_that_was_written():
    assert lead_span_length(100, 0.29) == 29  # 100 * 0.29 is 28.999999999999996
    assert lead_span_length(3, 0.1) == 1
    assert lead_span_length(7, 1.0) == 7


@pytest.mark.parametrize("lead_span", [0.0, -0.5, 1.01, math.nan])
def test_a_lead_span_outside_its_range_is_refused(lead_span):
    with pytest.raises(ValueError, match=r"expected a proportion in \(0, 1\]"):
        lead_span_length(10, lead_span)


def split(kept, values):
    return np.split(values, np.cumsum(kept.k)[:-1])


@pytest.mark.parametrize("policy", [KeepPolicy(64, 0.999), KeepPolicy(5, 0.9), KeepPolicy(1, 1.0)])
def test_the_fewest_entries_are_kept_that_reach_the_mass_and_the_realised_token_too(policy):
    logprobs, ids, row_logprobs = logits_rows(1)
    kept = keep_entries(ids, row_logprobs, policy)
    num_outside = 0
    for row, found in enumerate(split(kept, kept.top_ids)):
        order = np.argsort(-logprobs[row])
        mass = np.cumsum(np.exp(logprobs[row][order]))
        expected = min(int(np.searchsorted(mass, policy.mass)) + 1, policy.top_k)
        realised = ids[row, 0]
        if realised in order[:expected]:
            assert found.tolist() == order[:expected].tolist()
        else:
            num_outside += 1
            assert found.tolist() == [*order[:expected].tolist(), realised]
    if policy.top_k < 64:
        assert num_outside > 5  # the case was there


@pytest.mark.parametrize("certain", [0.0, 2**-24, -(2.0**-24)])
def test_a_mass_of_one_keeps_all_whatever_rounded_logprobs_sum_to(certain):
    """As rows of a real model do: a sure token's logprob, in float32, may be 0."""
    logprobs = np.array([[certain, certain, -15.1, -15.9, -16.2, -17.0]], np.float32)
    ids = np.array([[7, 7, 8, 9, 10, 11]], np.int32)
    kept = keep_entries(ids, logprobs, KeepPolicy(5, 1.0))
    assert kept.top_ids.tolist() == [7, 8, 9, 10, 11]
    assert len(keep_entries(ids, logprobs, KeepPolicy(5, 0.999)).top_ids) == 1


def test_stored_logprobs_are_the_teachers_within_the_grid_and_sum_to_one_with_the_tail():
    logprobs, ids, row_logprobs = logits_rows(2)
    kept = keep_entries(ids, row_logprobs, KeepPolicy(64, 0.999))
    stored = split(kept, stored_logprobs(kept.k, kept.top_logits, kept.tail_logit))
    tails = 1 / (1 + np.exp(-kept.tail_logit.astype(np.float64)))
    for row, (found, top_ids) in enumerate(zip(stored, split(kept, kept.top_ids), strict=True)):
        assert np.exp(found).sum() + tails[row] == pytest.approx(1.0, abs=1e-12)
        true = logprobs[row][top_ids]
        near = true > true[0] - 2.0  # half a step of the grid there, and the tail's rounding
        assert np.abs(found - true)[near].max() < 1 / 32
        assert np.abs(found - true)[true > true[0] - 8.0].max() < 0.15
        true_tail = 1 - np.exp(true).sum()
        assert tails[row] == pytest.approx(true_tail, rel=0.05)


def test_a_tail_below_the_resolution_of_float32_is_clamped_and_counted():
    ids = np.array([[7, 7, 8]], np.int32)
    logprobs = np.array([[0.0, 0.0, -40.0]], np.float32)
    kept = keep_entries(ids, logprobs, KeepPolicy(2, 1.0))
    assert kept.num_clamped_tails == 1
    assert 1 / (1 + np.exp(-kept.tail_logit[0])) == pytest.approx(TAIL_FLOOR, rel=0.05)


def test_impossible_candidates_are_dropped_and_an_impossible_realised_token_is_kept_far_out():
    ids = np.array([[9, 7, 8, 9]], np.int32)
    logprobs = np.array([[-np.inf, -0.01, -4.6, -np.inf]], np.float32)
    kept = keep_entries(ids, logprobs, KeepPolicy(3, 1.0))
    assert kept.top_ids.tolist() == [7, 8, 9]
    assert kept.top_logits[-1] == LOGIT_GRID[-1]
    assert kept.num_clamped_logits == 1


@settings(deadline=None)
@given(npst.arrays(np.float32, 20, elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_bfloat16_rounding_is_torchs(values):
    import torch

    expected = torch.tensor(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(round_to_bfloat16(values), expected)


def test_the_grid_is_fine_near_the_largest_and_reaches_sixty_nats():
    assert LOGIT_GRID[0] == 0
    assert (np.diff(LOGIT_GRID) < 0).all()
    assert len(LOGIT_GRID) <= 256
    assert -np.diff(LOGIT_GRID)[0] == pytest.approx(1 / 32)
    assert -np.diff(LOGIT_GRID)[-20:].min() < 1.8
    assert LOGIT_GRID[-1] == pytest.approx(-60, abs=0.01)


def test_band_b_of_every_trace_is_record_batch_b(tmp_path):
    traces = [make_simple("a", 40), make_simple("b", 7)]
    write(tmp_path / "cache", traces)
    with pa.ipc.open_file(str(tmp_path / "cache" / "shards" / "w0-00000.arrow")) as file:
        assert file.num_record_batches == 20
        for band in range(20):
            rows = file.get_batch(band).to_pylist()
            assert [row["band"] for row in rows] == [band, band]
            for row, trace in zip(rows, traces, strict=True):
                part = slice(trace.n_total * band // 20, trace.n_total * (band + 1) // 20)
                assert row["trace_id"] == trace.trace_id
                assert row["start"] == part.start
                assert row["token_ids"] == trace.token_ids[part].tolist()
                assert row["k"] == trace.k[part].tolist()


def make_simple(trace_id, n_total, num_kept=3):
    token_ids = np.arange(n_total, dtype=np.int32)
    k = np.full(n_total, num_kept, np.uint8)
    k[0] = 0
    return Trace(
        trace_id=trace_id,
        token_ids=token_ids,
        n_total=n_total,
        cot_start=1,
        answer_start=n_total - 1,
        k=k,
        top_ids=np.concatenate([t + np.arange(num_kept) for t in token_ids[1:]]).astype(np.int32),
        top_logits=np.tile(LOGIT_GRID[np.minimum(np.arange(num_kept), 99)], n_total - 1),
        tail_logit=np.where(k > 0, -4.0, 0).astype(np.float32),
    )


def test_every_column_reads_as_plain_values_without_this_package(tmp_path):
    trace = make_simple("a", 30)
    write(tmp_path / "cache", [trace], num_bands=1)
    with pa.ipc.open_file(str(tmp_path / "cache" / "shards" / "w0-00000.arrow")) as file:
        (row,) = file.read_all().to_pandas().to_dict("records")
        about = json.loads(file.schema.metadata[b"leadspan"])
    for name in ARRAYS:
        np.testing.assert_array_equal(np.array(row[name]), getattr(trace, name))
    assert about["format_version"] == 1
    assert about["header"]["teacher"] == make_header().teacher


def test_a_trace_with_more_distinct_ids_than_narrow_indices_hold_is_read_back(tmp_path):
    trace = make_simple("wide", 400, num_kept=200)
    ids = np.concatenate([t * 200 + np.arange(200) for t in range(1, 400)]).astype(np.int32)
    token_ids = np.concatenate([[0], ids[::200]]).astype(np.int32)
    wide = Trace(**{**vars(trace), "top_ids": ids, "token_ids": token_ids})
    folder = tmp_path / "cache"
    with CacheWriter(folder, make_header(vocab_size=100_000)) as writer:
        writer.append(FinishedTrace(wide, "source"))
        writer.finish()
    cache = open_cache(str(folder), allow_unsealed=True)
    assert_same(wide, read_all(cache)["wide"])


def test_invariants_of_a_trace_are_checked_when_it_is_written(tmp_path):
    good = make_simple("a", 10)
    broken = {
        "cot_start": 9999,
        "n_total": 5,
        "k": good.k[:-1],
        "top_ids": good.top_ids + 500,  # no longer holds the realised token
        "top_logits": good.top_logits + 1,
        "tail_logit": good.tail_logit + np.nan,
    }
    with CacheWriter(tmp_path / "cache", make_header(vocab_size=VOCAB_SIZE)) as writer:
        for name, value in broken.items():
            with pytest.raises(ValueError, match="trace 'a': "):
                writer.append(FinishedTrace(Trace(**{**vars(good), name: value}), "source"))
        writer.append(FinishedTrace(good, "source"))
        with pytest.raises(ValueError, match="already in the cache"):
            writer.append(FinishedTrace(good, "source"))
        with pytest.raises(ValueError, match="outside the teacher's vocabulary"):
            big = make_simple("b", VOCAB_SIZE + 1)
            writer.append(FinishedTrace(big, "source"))


def random_trace(trace_id, num_tokens, num_kept, vocab_size, seed=0):
    """Any ids of a vocabulary, the widest among them; the realised token last of each token's."""
    rng = np.random.default_rng(seed)
    stride = vocab_size // num_kept
    others = rng.integers(0, stride, (num_tokens - 1, num_kept)) + np.arange(num_kept) * stride
    others[-1:, -1] = vocab_size - 1
    codes = np.sort(rng.integers(0, len(LOGIT_GRID), others.shape), axis=1)
    codes[:, 0] = 0
    k = np.full(num_tokens, num_kept, np.uint8)
    k[0] = 0
    return Trace(
        trace_id=trace_id,
        token_ids=np.concatenate([[0], others[:, -1]]).astype(np.int32),
        n_total=num_tokens,
        cot_start=0,
        answer_start=num_tokens,
        k=k,
        top_ids=others.ravel().astype(np.int32),
        top_logits=LOGIT_GRID[codes].ravel(),
        tail_logit=np.where(k > 0, -4.0, 0).astype(np.float32),
    )


@pytest.mark.parametrize("vocab_size", [32_000, 151_936, 201_088, 262_144])
@pytest.mark.parametrize("num_kept", [1, 64, 254, 255])
def test_any_width_of_vocabulary_and_rows_comes_back(tmp_path, vocab_size, num_kept):
    traces = [random_trace(f"t{n}", n, num_kept, vocab_size, n) for n in (1, 2, 400)]
    folder = tmp_path / "cache"
    with CacheWriter(folder, make_header(vocab_size=vocab_size, top_k=254)) as writer:
        for trace in traces:
            writer.append(FinishedTrace(trace, "source"))
        writer.finish()
    found = read_all(open_cache(str(folder), allow_unsealed=True))
    for trace in traces:
        assert_same(trace, found[trace.trace_id])


def test_a_trace_of_131072_tokens_comes_back(tmp_path):
    trace = random_trace("long", 131_072, 4, 151_936)
    with CacheWriter(tmp_path, make_header(vocab_size=151_936)) as writer:
        writer.append(FinishedTrace(trace, "source"))
        writer.finish()
    cache = open_cache(str(tmp_path), allow_unsealed=True)
    assert_same(trace, read_all(cache)["long"])
    before = cache.bytes_read
    read_all(cache, lead_span=0.05)
    assert cache.bytes_read - before == cache.shards[0].prefix_bytes(1)


@pytest.mark.slow
def test_readers_see_whole_shards_while_a_writer_publishes(tmp_path):
    traces = [make_simple(f"t{number:02d}", 30 + number) for number in range(40)]
    passed, done = threading.Semaphore(0), threading.Event()

    def read_until_done():
        seen = []
        while not done.is_set():
            found = read_all(open_cache(str(tmp_path), allow_unsealed=True))
            for each in found.values():
                assert_same(traces[int(each.trace_id[1:])], each)
            seen.append(len(found))
            passed.release()
        return seen

    writer = CacheWriter(tmp_path, make_header(vocab_size=VOCAB_SIZE), shard_bytes=1500)
    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read_until_done) for _ in range(2)]
        try:
            for trace in traces:
                writer.append(FinishedTrace(trace, "source"))
                assert passed.acquire(timeout=60)  # readers are always in the middle of it
            writer.finish()
        finally:
            done.set()
    for reader in readers:
        seen = reader.result()
        assert seen == sorted(seen)
        assert len(set(seen)) > 3
    assert len(read_all(open_cache(str(tmp_path), allow_unsealed=True))) == 40


def test_small_tails_are_sums_and_others_what_is_left_row_by_row():
    """Rows of both kinds together; of a small tail 1 minus the float32 mass knows one digit."""
    rng = np.random.default_rng(5)
    spread = rng.choice([2.0, 14.0, 40.0], (400, 1))
    logits = rng.normal(0, 1, (400, 200)) * spread
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    best = np.argsort(-logprobs, axis=1)
    ids = np.concatenate([best[:, :1], best[:, :64]], axis=1).astype(np.int32)
    outside = np.take_along_axis(logprobs, best[:, 64:], axis=1)
    tails = np.logaddexp.reduce(outside, axis=1).astype(np.float32)
    given = np.take_along_axis(logprobs, ids, axis=1).astype(np.float32)
    kept = keep_entries(ids, given, KeepPolicy(64, 0.999), tails)

    beyond = np.where(np.arange(200) >= kept.k[:, None], 1.0, 0.0)
    exact = (np.exp(np.take_along_axis(logprobs, best, axis=1)) * beyond).sum(axis=1)
    exact = np.maximum(exact, TAIL_FLOOR)
    assert 40 < (exact < 1e-4).sum() < 360 and (exact < 1e-6).sum() > 5
    wanted = np.log(exact) - np.log1p(-exact)
    np.testing.assert_allclose(kept.tail_logit, wanted, atol=0.033)  # half a bfloat16 step at 8
    assert (kept.tail_logit[exact < 1e-4] < -9).all()
