"""Narrower views and truncated caches: what the full cache holds, and no more."""

import json

import numpy as np
import pytest
from caches import assert_same, logits_rows, read_all
from click.testing import CliRunner
from fakes import make_cache, make_header, make_traces

from student_train.data.draw import draw_spans
from student_train.data.stream import TraceStream
from student_train.data.tokens import TokenSelection
from student_train.data.traces import open_data
from teacher_cache.cli.group import cli
from teacher_cache.format import (
    CacheMismatchError,
    CacheWriter,
    FinishedTrace,
    KeepPolicy,
    NoiseFloor,
    Trace,
    keep_entries,
    lead_span_length,
    narrowed,
    open_cache,
    seal_cache,
)
from teacher_cache.format.checking.verify import verify_cache
from teacher_cache.format.lead_spans import LeadSpans
from teacher_cache.pages.traces import bytes_before, header_rows
from teacher_cache.transform.retokenize.configs import RetokenizeConfig
from teacher_cache.transform.retokenize.run import retokenize
from teacher_cache.transform.truncate import truncate_cache


def captured(ids, logprobs, policy):
    """A trace of all rows, token 0 before them, as a capture with this policy makes it."""
    kept = keep_entries(ids, logprobs, policy)
    return Trace(
        trace_id="t",
        token_ids=np.concatenate([[0], ids[:, 0]]).astype(np.int32),
        n_total=len(ids) + 1,
        cot_start=1,
        answer_start=2,
        k=np.concatenate([[0], kept.k]).astype(np.uint8),
        top_ids=kept.top_ids,
        top_logits=kept.top_logits,
        tail_logit=np.concatenate([[0.0], kept.tail_logit]).astype(np.float32),
    )


def tail_mass(trace):
    return 1 / (1 + np.exp(-trace.tail_logit[1:].astype(float)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("top_k", [1, 5, 16, 64])
def test_a_view_with_fewer_entries_equals_a_capture_with_fewer(seed, scale, top_k):
    _, ids, logprobs = logits_rows(seed, scale=scale)
    full = captured(ids, logprobs, KeepPolicy(64, 0.999))
    view = narrowed(full, KeepPolicy(top_k, 1.0))
    right = captured(ids, logprobs, KeepPolicy(top_k, 0.999))
    view.validate()
    for name in ("token_ids", "k", "top_ids", "top_logits"):
        np.testing.assert_array_equal(getattr(view, name), getattr(right, name))
    np.testing.assert_allclose(tail_mass(view), tail_mass(right), rtol=0.05, atol=0.01)


def test_a_view_with_less_mass_keeps_the_fewest_entries_that_reach_it():
    _, ids, logprobs = logits_rows(3)
    full = captured(ids, logprobs, KeepPolicy(64, 0.999))
    view, right = (
        narrowed(full, KeepPolicy(64, 0.9)),
        captured(ids, logprobs, KeepPolicy(64, 0.9)),
    )
    # The rounding of the stored logits may move the border by an entry, in few rows.
    assert (view.k != right.k).mean() < 0.1
    assert np.abs(view.k.astype(int) - right.k).max() <= 2
    np.testing.assert_allclose(tail_mass(view), tail_mass(right), atol=0.02)


def test_a_view_that_drops_nothing_is_the_trace():
    _, ids, logprobs = logits_rows(5)
    full = captured(ids, logprobs, KeepPolicy(64, 0.999))
    assert_same(narrowed(full, KeepPolicy(64, 1.0)), full)


@pytest.mark.parametrize("asked", [{"top_k": 2}, {"mass": 0.6}, {"top_k": 3, "mass": 0.8}])
def test_a_cache_is_read_with_fewer_entries_without_capturing_again(source, asked):
    policy = source.view(**asked)
    keep = {row: info.n_total for row, info in enumerate(source.shards[0].traces)}
    whole, narrow = source.read(0, keep), source.read(0, keep, policy)
    for row, trace in whole.items():
        narrow[row].validate()
        assert_same(narrow[row], narrowed(trace, policy))
    num_entries = [sum(t.num_entries for t in traces.values()) for traces in (narrow, whole)]
    assert num_entries[0] < num_entries[1]
    kept = np.concatenate([trace.k for trace in narrow.values()])
    assert kept.max() <= asked.get("top_k", 8) + 1


def test_a_view_as_captured_is_what_is_stored(source):
    keep = {0: source.shards[0].traces[0].n_total}
    for policy in (source.view(), source.view(top_k=8, mass=0.95)):
        assert_same(source.read(0, keep, policy)[0], source.read(0, keep)[0])


@pytest.mark.parametrize("asked", [{"top_k": 9}, {"mass": 0.96}])
def test_more_entries_than_were_captured_are_refused(source, asked):
    (name, value), *_ = asked.items()
    with pytest.raises(CacheMismatchError, match=rf"was captured with {name} .* with {value}"):
        source.view(**asked)


@pytest.mark.parametrize("asked", [{"top_k": 0}, {"mass": 0.0}, {"mass": float("nan")}])
def test_a_view_of_nothing_is_refused(source, asked):
    with pytest.raises(ValueError, match=f"{next(iter(asked))}: expected"):
        source.view(**asked)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_cache(make_cache(tmp_path_factory.mktemp("full") / "cache", make_traces(9)))


def test_a_truncated_cache_holds_the_lead_span_of_every_trace(source, tmp_path):
    truncate_cache(source, tmp_path / "half", lead_span=0.5)
    half = open_cache(str(tmp_path / "half"))
    assert half.header.max_lead_span == 0.5
    expected = read_all(source, lead_span=0.5)
    found = read_all(half, lead_span=0.5)
    assert sorted(found) == sorted(expected)
    for trace_id, trace in expected.items():
        assert_same(found[trace_id], trace)
    for trace_id, trace in read_all(source, lead_span=0.2).items():
        assert_same(read_all(half, lead_span=0.2)[trace_id], trace)
    sizes = [sum(s.size_bytes for s in cache.shards) for cache in (half, source)]
    assert sizes[0] < sizes[1]
    assert half.manifest.seal.num_tokens == sum(len(t.token_ids) for t in expected.values())


def test_reading_more_than_a_truncated_cache_holds_is_refused(source, tmp_path):
    truncate_cache(source, tmp_path / "half", lead_span=0.5)
    half = open_cache(str(tmp_path / "half"))
    with pytest.raises(CacheMismatchError, match=r"truncated to a lead span of 0\.5 and holds"):
        read_all(half, lead_span=0.6)
    with pytest.raises(CacheMismatchError, match=r"at most what it holds, a lead span of 0\.5"):
        truncate_cache(half, tmp_path / "again", lead_span=0.6)


def test_truncating_twice_is_truncating_once(source, tmp_path):
    truncate_cache(source, tmp_path / "most", lead_span=0.7, top_k=6)
    truncate_cache(open_cache(str(tmp_path / "most")), tmp_path / "less", lead_span=0.3, top_k=4)
    truncate_cache(source, tmp_path / "once", lead_span=0.3, top_k=4)
    twice, once = (open_cache(str(tmp_path / name)) for name in ("less", "once"))
    assert twice.header == once.header
    left, right = read_all(twice, lead_span=0.3), read_all(once, lead_span=0.3)
    for trace_id, trace in right.items():
        np.testing.assert_array_equal(left[trace_id].top_ids, trace.top_ids)
        np.testing.assert_array_equal(left[trace_id].top_logits, trace.top_logits)
        np.testing.assert_allclose(left[trace_id].tail_logit, trace.tail_logit, atol=0.1)


def test_fewer_entries_are_those_of_the_view(source, tmp_path):
    truncate_cache(source, tmp_path / "narrow", top_k=2)
    narrow = open_cache(str(tmp_path / "narrow"))
    assert (narrow.header.top_k, narrow.header.max_lead_span) == (2, 1.0)
    for trace_id, trace in read_all(source).items():
        assert_same(read_all(narrow)[trace_id], narrowed(trace, KeepPolicy(2, 1.0)))


def test_truncating_again_goes_on_and_another_source_is_refused(source, tmp_path):
    first = truncate_cache(source, tmp_path / "half", lead_span=0.5)
    assert truncate_cache(source, tmp_path / "half", lead_span=0.5) == first
    other = open_cache(make_cache(tmp_path / "other", make_traces(3, seed=4)))
    with pytest.raises(CacheMismatchError, match="part of another cache"):
        truncate_cache(other, tmp_path / "half", lead_span=0.5)
    with pytest.raises(CacheMismatchError, match=r"max_lead_span: 0\.5 there, 0\.4 now"):
        truncate_cache(source, tmp_path / "half", lead_span=0.4)


def test_the_command_says_what_it_made(source, tmp_path):
    out = tmp_path / "half"
    run = CliRunner().invoke(cli, ["truncate", source.path, str(out), "--lead-span", "0.5"])
    assert run.exit_code == 0, run.output
    assert "sealed, 9 traces" in run.output
    record = json.loads((out / "cache.json").read_text())
    assert record["header"]["max_lead_span"] == 0.5
    assert record["config"]["truncated_from"] == source.fingerprint


def test_inspect_shows_what_a_truncated_cache_holds(tmp_path):
    from teacher_cache.examine.inspection import inspect_cache

    traces = make_traces(4)
    make_cache(tmp_path / "whole", traces)
    truncate_cache(open_cache(str(tmp_path / "whole")), tmp_path / "half", lead_span=0.5)
    half = open_cache(str(tmp_path / "half"))
    figures = inspect_cache(half, 0)
    held = [lead_span_length(trace.n_total, 0.5) for trace in traces]
    assert figures.num_tokens == sum(held)
    assert figures.num_tokens_of == {
        "prompt": sum(trace.cot_start for trace in traces),
        "cot": sum(held) - sum(trace.cot_start for trace in traces),
        "answer": 0,
    }


MIXED = LeadSpans.parse("0.375:4,1:1")


def trained_rows(path, seed):
    """{trace id: (tokens, entries)} that a run with the mixture trains on in an epoch."""
    data = open_data([str(path)])
    found = {}
    with TraceStream(
        data, TokenSelection(MIXED), batch_traces=4, num_epochs=1, seed=seed
    ) as stream:
        for step in stream:
            for item in step.traces:
                assert len(item.trace) == item.selection.num_read(item.trace)
                found[item.trace.trace_id] = item.trace
    return found


@pytest.mark.slow
@pytest.mark.parametrize("traces_per_shard", [60, 2])  # drawn by trace, and by shard
def test_a_mixed_cache_gives_a_run_with_its_seed_the_rows_of_the_whole_one(
    tmp_path, traces_per_shard
):
    whole = make_cache(tmp_path / "whole", make_traces(60), traces_per_shard=traces_per_shard)
    truncate_cache(open_cache(whole), tmp_path / "mixed", lead_span=MIXED, seed=3)
    mixed = open_cache(tmp_path / "mixed")

    assert mixed.header.lead_spans == {"spans": "0.375:4,1:1", "seed": 3}
    expected, found = (trained_rows(path, seed=3) for path in (whole, tmp_path / "mixed"))
    assert sorted(found) == sorted(expected)
    for trace_id, trace in expected.items():
        assert_same(found[trace_id], trace)
    assert mixed.catalog.num_tokens == sum(len(trace) for trace in expected.values())
    assert 0.3 < mixed.catalog.num_tokens / sum(t.n_total for t in mixed.infos) < 0.7
    assert [mixed.num_held(info) for info in mixed.infos] == [len(t) for t in mixed]
    assert verify_cache(mixed.path).errors == []


def test_a_mixed_cache_refuses_what_it_does_not_hold(tmp_path):
    whole = make_cache(tmp_path / "whole", make_traces(60))
    truncate_cache(open_cache(whole), tmp_path / "mixed", lead_span=MIXED, seed=3)
    (source,) = open_data([str(tmp_path / "mixed")]).sources

    with pytest.raises(CacheMismatchError, match=r"0\.375:4,1:1 of seed 3.* with --seed 3"):
        draw_spans(source, TokenSelection(MIXED), seed=4)
    with pytest.raises(CacheMismatchError, match="or at most the shortest"):
        draw_spans(source, TokenSelection(), seed=3)
    draw_spans(source, TokenSelection(0.375), seed=4)
    with pytest.raises(CacheMismatchError, match="at most what it holds, the mixture"):
        truncate_cache(source.cache, tmp_path / "again", lead_span=MIXED, seed=4)
    assert not (tmp_path / "again").exists()
    truncate_cache(source.cache, tmp_path / "short", lead_span=0.2)
    truncate_cache(open_cache(whole), tmp_path / "once", lead_span=0.2)
    short = read_all(open_cache(tmp_path / "short"), lead_span=0.2)
    for trace_id, trace in read_all(open_cache(tmp_path / "once"), lead_span=0.2).items():
        assert_same(short[trace_id], trace)


@pytest.mark.slow
def test_a_mixed_cache_survives_a_lost_catalogue_and_a_stop(tmp_path):
    whole = open_cache(make_cache(tmp_path / "whole", make_traces(30)))
    first = truncate_cache(whole, tmp_path / "mixed", lead_span=MIXED)
    expected = {info.trace_id: info.n_held for info in open_cache(tmp_path / "mixed").infos}
    assert truncate_cache(whole, tmp_path / "mixed", lead_span=MIXED) == first
    (tmp_path / "mixed" / "catalog.parquet").unlink()
    assert {t.trace_id: t.n_held for t in open_cache(tmp_path / "mixed").infos} == expected


@pytest.mark.slow
def test_the_command_takes_a_mixture_and_its_seed(tmp_path):
    whole = make_cache(tmp_path / "whole", make_traces(30))
    words = ["truncate", whole, str(tmp_path / "mixed"), "--lead-span", "0.375:4,1:1"]
    run = CliRunner().invoke(cli, [*words, "--seed", "5"])
    assert run.exit_code == 0, run.output
    header = json.loads((tmp_path / "mixed" / "cache.json").read_text())["header"]
    assert header["lead_spans"] == {"spans": "0.375:4,1:1", "seed": 5}
    assert "max_lead_span" not in header  # its largest span is 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lead-span", "half"], "expected a number, or lengths with weights"),
        (["--lead-span", "0.5:1,1.5:1"], "at most 1"),
        (["--lead-span", "0.5", "--seed", "1"], "nothing is drawn for the single"),
    ],
)
def test_spans_that_cannot_be_are_refused(tmp_path, options, said):
    make_cache(tmp_path / "whole", make_traces(4))
    words = ["truncate", str(tmp_path / "whole"), str(tmp_path / "part"), *options]

    result = CliRunner().invoke(cli, words)

    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert not (tmp_path / "part").exists()


def test_a_truncated_cache_keeps_the_noise_floor_of_its_rows(tmp_path):
    floor = NoiseFloor(mean=1e-6, p99=1e-5, max=1e-4, num_traces=2, num_tokens=30)
    with CacheWriter(tmp_path / "whole", make_header()) as writer:
        for trace in make_traces(2):
            writer.append(FinishedTrace(trace, source_hash="s"))
        writer.keep_noise(floor)
        writer.finish()
    seal_cache(tmp_path / "whole")
    truncate_cache(open_cache(tmp_path / "whole"), tmp_path / "half", lead_span=0.5)
    assert open_cache(tmp_path / "half").manifest.noise == floor


@pytest.mark.slow
def test_other_commands_know_that_a_mixed_cache_holds_parts(tmp_path):
    whole = make_cache(tmp_path / "whole", make_traces(30))
    truncate_cache(open_cache(whole), tmp_path / "mixed", lead_span=MIXED)
    mixed = open_cache(tmp_path / "mixed")

    sizes = bytes_before(mixed)
    assert sizes[36] is not None
    assert sizes[99] is None  # of 100 %
    assert "0.375:4,1:1" in header_rows(mixed)["lead_spans"]
    config = RetokenizeConfig(
        cache=mixed.path, out=str(tmp_path / "other"), student="none", rows=None
    )
    with pytest.raises(CacheMismatchError, match="Retokenize the cache that it was made from"):
        retokenize(config)
    result = CliRunner().invoke(cli, ["plan", "--sample", mixed.path, "--num-prompts", "100"])
    assert isinstance(result.exception, CacheMismatchError)
