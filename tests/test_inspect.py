"""`inspect`: figures of all shards or of a sample that says so, journals, and a trace as text."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from fakes import TOKENS, make_cache, make_header, make_trace, make_traces, write_shards
from students import make_student

from teacher_cache.cli.group import cli
from teacher_cache.cli.report_text import bar_lines
from teacher_cache.examine.inspection import parse_range
from teacher_cache.examine.measured import histogram, measure_entries, section_lengths
from teacher_cache.format import CacheWriter, FinishedTrace, open_cache


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_student(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def traces():
    return make_traces(12)


@pytest.fixture(scope="module")
def path(tmp_path_factory, traces):
    return make_cache(tmp_path_factory.mktemp("inspect") / "cache", traces, traces_per_shard=2)


def invoke(*args, exit_code=0):
    result = CliRunner().invoke(cli, ["inspect", *map(str, args)])
    assert result.exit_code == exit_code, (result.output, result.exception)
    return result


def test_entropy_is_that_of_the_kept_entries_and_the_tail():
    trace = make_trace("t", 40, without_entries=[7])
    for t in (1, 7, 39):
        p = np.append(np.exp(trace.logprobs(t).logprobs), trace.tail[t])
        expected = 0 if t == 7 else -(p * np.log(p)).sum()
        assert trace.entropy[t] == pytest.approx(expected)


def test_figures_of_all_shards_are_those_of_all_tokens(path, traces):
    found = measure_entries(open_cache(path), 0)
    k = np.concatenate([trace.k[trace.k > 0] for trace in traces])
    tail = np.concatenate([trace.tail[trace.k > 0] for trace in traces])
    entropy = np.concatenate([trace.entropy[trace.k > 0] for trace in traces])

    assert (found.is_all, found.num_shards, found.num_traces) == (True, 6, 12)
    assert found.mean_k == pytest.approx(k.mean())
    assert found.tail_mass_mean == pytest.approx(tail.mean(), rel=1e-5)
    assert found.tail_mass_p99 == pytest.approx(np.quantile(tail, 0.99), rel=1e-5)
    assert found.mean_entropy == pytest.approx(entropy.mean(), rel=1e-5)
    for counts in (found.k_histogram, found.tail_histogram, found.entropy_histogram):
        assert sum(counts.values()) == len(k)


def test_a_sample_says_what_it_is_of(path, model):
    found = measure_entries(open_cache(path), 3)
    assert (found.is_all, found.num_shards, found.num_traces) == (False, 3, 6)
    said = invoke(path, "--model", model).stdout
    assert "measured on a sample, 4 of 6 shards with 8 traces (--shards 0 for all)" in said
    every = invoke(path, "--model", model, "--shards", 0).stdout
    assert "measured on every token that has a distribution" in every


def test_sections_are_counted_by_length_for_every_trace(path, traces):
    counts = section_lengths(open_cache(path))

    for name, lengths in (
        ("prompt", [t.cot_start for t in traces]),
        ("answer", [t.n_total - t.answer_start for t in traces]),
    ):
        for label, count in counts[name].items():
            low, _, high = label.partition("-")
            assert count == sum(int(low) <= n <= int(high or low) for n in lengths)
        assert sum(counts[name].values()) == len(traces)


def test_histograms_leave_out_empty_ends_alone():
    assert histogram(np.array([3, 9]), (1, 2, 4, 8, 16, 32), integers=True) == {
        "2-3": 1, "4-7": 0, "8-15": 1,
    }  # fmt: skip
    assert histogram(np.array([0.0, 5.0]), (0, 0.1, 1, np.inf)) == {
        "< 0.1": 1, ">= 0.1": 0, ">= 1": 1,
    }  # fmt: skip
    assert histogram(np.zeros(0), (0, 1)) == {}


@pytest.mark.parametrize("can_draw", [True, False])
def test_pictures_fit_two_beside_each_other_on_80_columns(path, model, can_draw):
    counts = {"1": 99_999_999, "2": 1, "3": 0, "10-20": 123_456}
    lines = bar_lines("kept entries", counts, can_draw=can_draw)

    assert max(map(len, lines)) <= 39
    assert lines[1].endswith("█" * 16 if can_draw else "#" * 16)
    assert lines[2].endswith("▏" if can_draw else "#")
    assert lines[3].endswith(" 0")
    said = invoke(path, "--model", model, "--shards", 0).stdout
    pictures = said[said.index("measured on") : said.index("\ntrace ")]
    assert max(map(len, pictures.splitlines())) <= 80


def test_an_unfinished_capture_says_what_stands_in_its_journals(tmp_path, traces, model):
    path = write_shards(tmp_path / "cache", traces[:4])
    writer = CacheWriter(path, make_header(), worker="w9")
    for trace in traces[4:7]:
        writer.append(FinishedTrace(trace, source_hash=trace.trace_id))
    said = invoke(path, "--model", model).stdout
    tokens = sum(map(len, traces[4:7]))

    assert "not complete" in said
    assert f"not counted above: 3 finished traces ({tokens} tokens) in the journals of 1 w" in said
    assert json.loads(invoke(path, "--json").stdout)["journalled"]["num_traces"] == 3
    writer.close()


def test_before_the_first_shard_there_are_only_journals(tmp_path, traces):
    path = tmp_path / "cache"
    with CacheWriter(path, make_header()) as writer:
        writer.append(FinishedTrace(traces[0], source_hash="s"))
        found = json.loads(invoke(path, "--json").stdout)

    assert (found["num_traces"], found["journalled"]["num_traces"]) == (0, 1)


def test_a_trace_is_text_and_its_alternatives_come_on_demand(path, traces, model):
    trace = traces[3]
    said = invoke(path, "--model", model, "--trace", "t3").stdout
    text = said[said.index("\ntrace t3") :]

    assert f"-- cot, {trace.answer_start - trace.cot_start} tokens" in text
    assert TOKENS[trace.token_ids[-1]] in text.splitlines()[-1]
    assert "tail" not in text
    listed = invoke(path, "--model", model, "--trace", "t3", "--tokens", "5:8").stdout
    rows = listed[listed.index("-- answer") :].strip().splitlines()[-3:]
    assert [row.split()[0] for row in rows] == ["5", "6", "7"]
    assert all("tail" in row for row in rows)


def test_a_long_trace_nobody_asked_for_loses_its_middle_and_a_named_one_does_not(tmp_path, model):
    long = replace(make_trace("long", 3000))
    path = make_cache(tmp_path / "cache", [long])

    assert " characters)" in invoke(path, "--model", model).stdout
    assert " characters)" not in invoke(path, "--model", model, "--trace", "long").stdout


@pytest.mark.parametrize("text", ["5", "7:7", "8:2", "-3:4", "a:b", ":x"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(ValueError, match="such as 100:140"):
        parse_range(text)


def test_ranges_may_be_open():
    assert parse_range("100:140") == (100, 140)
    assert parse_range(":9") == (0, 9)
    assert parse_range("4:")[0] == 4


def test_the_figures_are_a_page_too(path, model, tmp_path):
    page = tmp_path / "cache.html"
    invoke(path, "--model", model, "--html", page)
    text = page.read_text()

    assert "A sample: 4 of 6 shards, 8 traces." in text
    assert text.count("<svg") == 6
    assert "kept entries (mean" in text
    assert "already exists" in str(invoke(path, "--html", page, exit_code=1).exception)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--json", "--tokens", "0:4"), "--json: the cache's figures alone"),
        (("--json", "--trace", "t0"), "--json: the cache's figures alone"),
        (("--tokens", "5000:6000"), "--tokens 5000: the cache holds"),
        (("--trace", "nobody"), "no trace 'nobody'"),
    ],
)
def test_options_that_would_change_nothing_are_refused_before_anything_is_shown(
    path, options, reason
):
    done = invoke(path, *options, exit_code=1)
    assert reason in str(done.exception)
    assert done.stdout == ""
