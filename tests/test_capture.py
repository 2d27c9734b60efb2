"""The capture loop with a table as teacher: nothing lost or repeated, every row in its place."""

import itertools
import json
import os
import signal
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from caches import assert_same, read_all
from captures import (
    CLOSE_ID,
    END_ID,
    OPEN_ID,
    TableTeacher,
    names,
    row_over,
    write_prompts,
)

from teacher_cache.capture import run as capture_module
from teacher_cache.capture.configs import ScoreConfig
from teacher_cache.capture.generate import generate
from teacher_cache.capture.score import score
from teacher_cache.engines import EngineError
from teacher_cache.format import (
    CacheMismatchError,
    open_cache,
    seal_cache,
    store,
)
from teacher_cache.format.writing import writer
from teacher_cache.sources import SourceError
from teacher_cache.transform.truncate import truncate_cache


def test_every_prompt_becomes_a_trace_with_its_sections_and_fields(capture_config, asked):
    report = generate(capture_config)
    assert (report.num_traces, report.sealed, report.num_unfinished) == (6, True, 0)
    traces = read_all(open_cache(str(capture_config.out)))
    assert sorted(traces) == [f"p{n}" for n in range(6)]
    for n in range(6):
        trace = traces[f"p{n}"]
        assert trace.fields == {"answer": n}
        assert trace.finish_reason == "stop"
        assert trace.token_ids[trace.cot_start] == OPEN_ID
        assert trace.token_ids[trace.answer_start - 1] == CLOSE_ID
        assert trace.token_ids[-1] == END_ID
        assert trace.k[: trace.cot_start].tolist() == [0] * trace.cot_start  # no prompt rows
        assert (trace.k[trace.cot_start :] > 0).all()


def test_entry_t_is_the_distribution_over_token_t(capture_config, asked):
    generate(replace(capture_config, capture_prompt=True, mass=1.0))
    for trace in read_all(open_cache(str(capture_config.out))).values():
        for t in range(1, trace.n_total):
            ids, logprobs = trace.logprobs(t)
            expected = row_over(int(trace.token_ids[t - 1]))[ids]
            shifted = row_over(int(trace.token_ids[t]))[ids]
            near = expected > expected.max() - 5
            assert np.abs(logprobs - expected)[near].max() < 0.05
            assert np.abs(logprobs - shifted)[near].max() > 0.05


def test_what_is_finished_is_not_asked_again(capture_config, asked):
    asked.teacher = lambda requests: TableTeacher(requests, fail_after=4)
    with pytest.raises(EngineError, match="fell down"):
        generate(capture_config)
    assert names(asked) == ["p0", "p1", "p2", "p3"]
    asked.clear()
    asked.teacher = TableTeacher
    report = generate(capture_config)
    assert names(asked) == ["p4", "p5"]
    assert (report.num_traces, report.survey.num_taken, report.sealed) == (2, 6, True)
    assert len(read_all(open_cache(str(capture_config.out)))) == 6


def test_a_stop_signal_keeps_what_is_finished_and_says_which_it_was(capture_config, asked):
    asked.teacher = lambda requests: TableTeacher(requests, signal_after=3)
    report = generate(capture_config)
    assert report.stopped_by == signal.SIGTERM
    assert not report.sealed
    asked.clear()
    asked.teacher = TableTeacher
    assert generate(capture_config).num_traces == 3
    assert len(read_all(open_cache(str(capture_config.out)))) == 6


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["seal_cache", "publish"])
def test_a_stop_signal_while_the_cache_is_finished_is_answered_too(
    capture_config, asked, monkeypatch, signum, moment
):
    """Of the main thread in the seal, and while it waits for the last shard."""
    owner = capture_module if moment == "seal_cache" else store.Store
    real = getattr(owner, moment)

    def stopped(*call, **named):
        if moment == "seal_cache" or str(call[1]).endswith(".arrow"):
            os.kill(os.getpid(), signum)
        return real(*call, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, stopped)
        report = generate(capture_config)
    assert (report.stopped_by, report.sealed, report.num_traces) == (signum, False, 6)
    asked.teacher = None  # nothing is left for a teacher
    assert generate(capture_config).sealed
    assert len(read_all(open_cache(str(capture_config.out)))) == 6


def test_a_trial_run_leaves_the_cache_open_for_the_rest(capture_config, asked):
    trial = generate(replace(capture_config, limit=2))
    assert (trial.num_traces, trial.sealed, trial.survey.num_wanted) == (2, False, 6)
    asked.clear()
    report = generate(capture_config)
    assert names(asked) == ["p2", "p3", "p4", "p5"]
    assert report.sealed


def test_a_complete_capture_run_again_starts_no_teacher(capture_config, asked):
    generate(capture_config)
    asked.teacher = None  # would fail when called
    report = generate(capture_config)
    assert (report.num_traces, report.sealed) == (0, True)


def test_new_prompts_for_a_sealed_cache_are_refused(capture_config, asked):
    generate(capture_config)
    asked.teacher = None
    write_prompts(capture_config.prompts, 8)
    with pytest.raises(CacheMismatchError, match="is sealed, and 2 of 8 traces are not in it"):
        generate(capture_config)


@pytest.mark.parametrize("change", [{"top_k": 4}, {"seed": 1}, {"temperature": 0.5}, {"mass": 0.5}])
def test_another_captures_folder_is_refused_before_the_teacher_starts(
    capture_config, asked, change
):
    generate(replace(capture_config, limit=1))
    asked.teacher = None
    (name,) = change
    with pytest.raises(CacheMismatchError, match=name):
        generate(replace(capture_config, **change))


def test_a_changed_prompt_under_an_old_id_is_refused(capture_config, asked):
    generate(replace(capture_config, limit=3))
    capture_config.prompts.write_text('{"id": "p0", "prompt": "b b b"}\n')
    with pytest.raises(SourceError, match=r"'p0' is already in .*, made from other content"):
        generate(capture_config)


def test_samples_of_a_prompt_have_their_own_names_and_seeds(capture_config, asked):
    generate(replace(capture_config, samples_per_prompt=3))
    assert len(names(asked)) == 18
    assert names(asked)[:3] == ["p0#0", "p0#1", "p0#2"]
    assert len({request.seed for request in asked}) == 18
    assert (
        len(
            {
                trace.token_ids.tobytes()
                for trace in read_all(open_cache(str(capture_config.out))).values()
            }
        )
        == 18
    )


def test_seeds_do_not_depend_on_what_else_is_captured(capture_config, asked):
    generate(replace(capture_config, limit=1))
    alone = asked[0]
    asked.clear()
    write_prompts(capture_config.prompts, 6)
    generate(replace(capture_config, out=capture_config.out.parent / "other"))
    assert next(r for r in asked if r.request_id == alone.request_id).seed == alone.seed


def test_a_cut_chain_of_thought_is_kept_and_counted(capture_config, asked):
    report = generate(replace(capture_config, max_new_tokens=4))
    assert report.num_unfinished == 6
    for trace in read_all(open_cache(str(capture_config.out))).values():
        assert trace.finish_reason == "length"
        assert trace.answer_start == trace.n_total


def test_generation_stops_at_a_budget_that_counts_the_prompt(capture_config, asked):
    with capture_config.prompts.open("a") as file:
        file.write('{"id": "long", "prompt": "a 1 2 3 4 5 6 7"}\n')
    report = generate(replace(capture_config, stop_at_tokens=6, max_new_tokens=None))
    cache = open_cache(str(capture_config.out))
    traces = read_all(cache)

    assert report.num_unfinished == len(traces) == 6  # the long prompt leaves no room
    assert {trace.n_total for trace in traces.values()} == {6}
    assert all(trace.finish_reason == "length" for trace in traces.values())
    assert cache.header.sampling["stop_at_tokens"] == 6
    with pytest.raises(CacheMismatchError, match="stop_at_tokens"):
        generate(replace(capture_config, stop_at_tokens=7, max_new_tokens=None))


def test_the_smaller_of_two_budgets_counts(capture_config, asked):
    generate(replace(capture_config, stop_at_tokens=30, max_new_tokens=4))
    assert {request.max_new_tokens for request in asked} == {4}


def test_a_bad_row_stops_a_strict_capture_before_the_teacher_starts(capture_config, asked):
    asked.teacher = None
    with capture_config.prompts.open("a") as file:
        file.write('{"prompt": ""}\n')
    with pytest.raises(SourceError, match=r"prompts\.jsonl:7: the prompt is empty"):
        generate(replace(capture_config, strict=True))
    assert not capture_config.out.exists()


def test_rows_that_are_left_out_are_said_and_listed_before_the_teacher_starts(
    capture_config, asked, caplog
):
    with capture_config.prompts.open("a") as file:
        file.write('{"id": "x", "prompt": ""}\nnonsense\n{"prompt": " "}\n')
    listed = capture_config.out / "rejects.jsonl"

    def start(requests):
        assert listed.exists()
        assert "left out: 2 rows, empty-prompt, e.g. " in caplog.text
        assert "left out: 1 rows, not-json, e.g. " in caplog.text
        assert f"all 3 rows left out are listed in {listed}" in caplog.text
        return TableTeacher(requests)

    asked.teacher = start
    report = generate(capture_config)
    assert (report.num_traces, report.survey.num_rejected, report.sealed) == (6, 3, True)
    rejects = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(r["row"], r["id"], r["reason"]) for r in rejects] == [
        (7, "x", "empty-prompt"),
        (8, None, "not-json"),
        (9, None, "empty-prompt"),
    ]


def test_an_input_without_a_usable_row_says_why(capture_config, asked):
    capture_config.prompts.write_text('{"text": "a"}\n{"text": "b"}\n{"prompt": ""}\n')
    with pytest.raises(
        SourceError, match=r"found none \(2 of 3 rows: unknown-columns, e\.g\. .*:1: "
    ):
        generate(capture_config)
    assert not capture_config.out.exists()


def test_only_the_ids_of_a_file_are_captured_and_missing_ones_said(capture_config, asked, caplog):
    ids = capture_config.prompts.with_name("ids.txt")
    ids.write_text("p4\nnowhere\n\np1\n")
    report = generate(replace(capture_config, ids_file=ids))
    assert names(asked) == ["p1", "p4"]
    assert "ids asked for but missing: 1, nowhere" in caplog.text
    assert (report.survey.num_wanted, report.sealed) == (2, True)


def test_an_empty_input_is_refused(capture_config, asked):
    capture_config.prompts.write_text("\n")
    with pytest.raises(SourceError, match="expected at least one row, found none"):
        generate(capture_config)


@pytest.mark.parametrize("capture_prompt", [True, False])
def test_scoring_keeps_the_tokens_that_were_given(capture_config, asked, capture_prompt, tmp_path):
    traces = tmp_path / "traces.jsonl"
    row = {"id": "x", "prompt": "a b c", "response": "<think> d </think> 5"}
    traces.write_text(json.dumps(row))
    score(
        ScoreConfig(
            model=capture_config.model,
            traces=traces,
            out=tmp_path / "scored",
            top_k=8,
            capture_prompt=capture_prompt,
        )
    )
    trace = read_all(open_cache(str(tmp_path / "scored")))["x"]
    assert (trace.finish_reason, trace.cot_start, trace.answer_start) == ("scored", 3, 6)
    assert (trace.k > 0).tolist() == [False, *[capture_prompt] * 2, *[True] * 5]


@pytest.fixture
def scoring(capture_config, asked, tmp_path):
    """Score one conversation whose assistant speaks twice; returns the cache's trace."""
    turns = [
        ("user", "a b c"),
        ("assistant", "d e"),
        ("user", "f"),
        ("assistant", "<think> g </think> 5"),
    ]
    row = {"id": "x", "messages": [{"role": r, "content": c} for r, c in turns]}
    traces = tmp_path / "traces.jsonl"
    traces.write_text(json.dumps(row))

    def run(**changes):
        out = tmp_path / "scored"
        score(ScoreConfig(model=capture_config.model, traces=traces, out=out, top_k=8, **changes))
        return read_all(open_cache(str(out)))["x"]

    return run


def test_turns_of_the_prompt_that_are_not_the_assistants_can_go_without_distributions(
    scoring, tmp_path
):
    trace = scoring(prompt_turns="assistant")
    has_rows = [0] * 6 + [0, 0, 1, 1, 1] + [0] * 4 + [0, 0] + [1] * 5
    assert (trace.k > 0).tolist() == [bool(has) for has in has_rows]
    with pytest.raises(CacheMismatchError, match="prompt_turns: assistant there, all now"):
        scoring()
    (tmp_path / "scored").rename(tmp_path / "assistant")
    whole = scoring()
    assert (whole.k > 0).tolist() == [False] + [True] * (whole.n_total - 1)
    kept = [whole.logprobs(t).ids for t in np.flatnonzero(trace.k)]
    np.testing.assert_array_equal(trace.top_ids, np.concatenate(kept))
    np.testing.assert_array_equal(trace.tail_logit[trace.k > 0], whole.tail_logit[trace.k > 0])


@pytest.mark.parametrize(
    ("part", "first", "num_tokens"), [("lead", 0, 11), ("middle", 5, 11), ("last", 11, 11)]
)
def test_a_slice_is_scored_as_a_sequence_of_its_own(scoring, tmp_path, part, first, num_tokens):
    whole = scoring()
    (tmp_path / "scored").rename(tmp_path / "whole")
    trace = scoring(slice=f"{part}:0.5")
    assert whole.n_total == 22
    np.testing.assert_array_equal(trace.token_ids, whole.token_ids[first : first + num_tokens])
    bounds = [min(max(b - first, 0), num_tokens) for b in (whole.cot_start, whole.answer_start)]
    assert [trace.cot_start, trace.answer_start, trace.n_total] == [*bounds, num_tokens]
    assert (trace.k > 0).tolist() == [False] + [True] * (num_tokens - 1)
    cut = {"part": part, "proportion": 0.5, "first_token": first, "n_whole": 22}
    assert trace.fields == {"slice": cut}
    with pytest.raises(CacheMismatchError, match=f"slice: {part}:0.5 there, lead:0.9 now"):
        scoring(slice="lead:0.9")


def test_a_lead_span_of_a_capture_is_the_truncated_cache(capture_config, asked, tmp_path):
    generate(capture_config)
    parted = replace(capture_config, out=tmp_path / "parted", lead_span=0.5, capture_prompt=False)
    generate(parted)
    whole, part = (open_cache(str(each.out)) for each in (capture_config, parted))
    assert part.header.max_lead_span == 0.5
    truncate_cache(whole, tmp_path / "truncated", lead_span=0.5)
    expected = read_all(open_cache(str(tmp_path / "truncated")), lead_span=0.5)
    found = read_all(part, lead_span=0.5)
    assert found.keys() == expected.keys() and len(found) == 6
    for trace_id, trace in expected.items():
        assert_same(found[trace_id], trace)
    with pytest.raises(CacheMismatchError, match=r"truncated to a lead span of 0\.5 and holds"):
        read_all(part)
    with pytest.raises(CacheMismatchError, match=r"max_lead_span: 0\.5 there, 1\.0 now"):
        generate(replace(parted, lead_span=1.0))


def test_traces_whose_lead_span_ends_in_the_prompt_are_counted(capture_config, asked, caplog):
    generate(replace(capture_config, lead_span=0.05, capture_prompt=False))
    assert "of the 6 traces captured now hold no distribution" in caplog.text
    assert "lead span of 0.05 ends inside their prompts" in caplog.text


def test_scoring_computes_nothing_beyond_its_lead_span(scoring, asked, tmp_path):
    whole = scoring()
    (tmp_path / "scored").rename(tmp_path / "whole")
    with pytest.raises(CacheMismatchError, match="holds 6 tokens of trace 'x', 22 were asked for"):
        scoring(lead_span=0.3)
    assert [len(request.token_ids) for request in asked] == [22, 6]
    part = read_all(open_cache(str(tmp_path / "scored")), lead_span=0.3)["x"]
    assert_same(part, whole[:6])
    assert (part.n_total, part.cot_start, part.answer_start) == (22, 17, 20)


def test_a_lead_span_is_scored_that_fits_whatever_its_trace(scoring, asked):
    with pytest.raises(SourceError, match=r"lead span of 6 in a trace of 22 tokens.*holds 5"):
        scoring(lead_span=0.3, max_model_len=5)
    assert asked == []
    with pytest.raises(CacheMismatchError, match="holds 6 tokens of trace 'x', 22 were asked for"):
        scoring(lead_span=0.3, max_model_len=6)
    assert [len(request.token_ids) for request in asked] == [6]


def test_a_given_trace_that_was_cut_is_flagged_and_counted(capture_config, asked, tmp_path):
    traces = tmp_path / "traces.jsonl"
    traces.write_text('{"id": "x", "prompt": "a", "response": "<think> b c"}')
    report = score(
        ScoreConfig(model=capture_config.model, traces=traces, out=tmp_path / "scored", top_k=8)
    )
    assert report.num_unfinished == 1
    trace = read_all(open_cache(str(tmp_path / "scored")))["x"]
    assert (trace.finish_reason, trace.answer_start, trace.n_total) == ("length", 4, 4)


@pytest.mark.parametrize("part", ["lead", "middle", "last"])
def test_tokens_without_distributions_move_with_the_slice(scoring, tmp_path, part):
    whole = scoring(prompt_turns="assistant")
    (tmp_path / "scored").rename(tmp_path / "whole")
    trace = scoring(prompt_turns="assistant", slice=f"{part}:0.7")
    first = trace.fields["slice"]["first_token"]
    expected = whole.k[first : first + trace.n_total] > 0
    expected[0] = False
    assert (trace.k > 0).tolist() == expected.tolist()


def test_a_slice_of_one_token_is_left_out(scoring):
    with pytest.raises(SourceError, match="1 of 1 rows: trace-too-short"):
        scoring(slice="last:0.05")


def test_both_modes_store_the_same_entries_for_the_same_tokens(capture_config, asked, tmp_path):
    generate(replace(capture_config, capture_prompt=True))
    generated = read_all(open_cache(str(capture_config.out)))
    traces = tmp_path / "traces.jsonl"
    with traces.open("w") as file:
        for trace in generated.values():
            row = {
                "id": trace.trace_id,
                "token_ids": trace.token_ids.tolist(),
                "cot_start": trace.cot_start,
                "answer_start": trace.answer_start,
            }
            file.write(json.dumps(row) + "\n")
    score(ScoreConfig(model=capture_config.model, traces=traces, out=tmp_path / "scored", top_k=8))
    scored = read_all(open_cache(str(tmp_path / "scored")))
    for name, trace in generated.items():
        for column in ("token_ids", "k", "top_ids", "top_logits", "tail_logit"):
            np.testing.assert_array_equal(getattr(trace, column), getattr(scored[name], column))


def test_one_worker_of_several_leaves_the_seal_to_the_end(capture_config, asked):
    assert not generate(replace(capture_config, worker="a")).sealed
    seal_cache(capture_config.out)
    assert len(open_cache(str(capture_config.out)).traces) == 6


def test_a_model_folder_may_be_spelt_in_another_way(capture_config, asked):
    generate(replace(capture_config, limit=2))
    assert generate(replace(capture_config, model=capture_config.model + "/.")).num_traces == 4


@pytest.mark.parametrize(
    "bad", [{"top_k": 0}, {"top_k": 255}, {"mass": 0.0}, {"mass": 1.5}, {"think_open": ""}]
)
def test_settings_outside_their_range_are_refused(capture_config, bad):
    with pytest.raises(ValueError, match="expected"):
        replace(capture_config, **bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"slice": "left:0.5"}, "expected lead, middle, last with a proportion"),
        ({"slice": "lead:1.5"}, "got 'lead:1.5'"),
        ({"slice": "lead"}, "got 'lead'"),
        ({"prompt_turns": "user"}, "expected one of all, assistant"),
        ({"prompt_turns": "assistant", "capture_prompt": False}, "without --capture-prompt"),
    ],
)
def test_settings_of_score_outside_their_range_are_refused(bad, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ScoreConfig(model="m", traces=tmp_path, out=tmp_path, **bad)


class LongTraces(TableTeacher):
    """Always the same 2,000 tokens after the prompt."""

    facts = replace(TableTeacher.facts, max_model_len=4096)

    def run(self, requests):
        first = next(requests)
        short = self.rows(first)
        repeat = 2000 // len(short.row_ids)
        ids, logprobs = (
            np.tile(short.row_ids, (repeat, 1)),
            np.tile(short.row_logprobs, (repeat, 1)),
        )
        tokens = np.concatenate([short.token_ids[: short.num_given], ids[:, 0]])
        for request in itertools.chain([first], requests):
            yield replace(
                short,
                request_id=request.request_id,
                token_ids=tokens.copy(),
                row_ids=ids.copy(),
                row_logprobs=logprobs.copy(),
            )


def peak_bytes_of_capture(config, num_prompts, folder):
    rows = [{"id": f"p{n}", "prompt": "a 1"} for n in range(num_prompts)]
    config.prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tracemalloc.start()
    try:
        assert generate(replace(config, out=folder)).num_traces == num_prompts
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_prompts(
    capture_config, asked, monkeypatch, tmp_path
):
    monkeypatch.setattr(writer, "MAX_DECODED_BYTES", 1 << 20)  # of a journal: small shards
    asked.teacher = LongTraces
    _, few, many = (  # what is made once is made by the first
        peak_bytes_of_capture(capture_config, number, tmp_path / str(number))
        for number in (20, 60, 160)
    )
    rows_bytes = 2000 * 9 * 8  # of one trace, as the teacher gives them
    assert few > rows_bytes
    assert (many - few) / 100 < rows_bytes / 40  # names, hashes and records remain
