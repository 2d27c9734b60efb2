"""The capture loop with a table as teacher: nothing lost or repeated, every row in its place."""

import itertools
import json
import os
import signal
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from test_format import read_all
from test_sources import CHAT, make_teacher

from teacher_cache.capture import prepare
from teacher_cache.capture import run as capture_module
from teacher_cache.capture.configs import GenerateConfig, ScoreConfig
from teacher_cache.capture.generate import generate
from teacher_cache.capture.score import score
from teacher_cache.engines import EngineError, TeacherFacts, TeacherRows
from teacher_cache.format import (
    CacheMismatchError,
    open_cache,
    seal_cache,
    store,
)
from teacher_cache.format.writing import writer
from teacher_cache.sources import SourceError

VOCAB_SIZE = 50
OPEN_ID, CLOSE_ID, END_ID = 2, 3, 0


def row_over(token_id):
    """Logprobs of every token after `token_id`; the same on every machine."""
    logits = np.random.default_rng(token_id).normal(0, 2, VOCAB_SIZE)
    return logits - np.logaddexp.reduce(logits)


class TableTeacher:
    """Every next token depends on the last one only; a trace thinks, answers and ends."""

    facts = TeacherFacts("table", "1", "float64", "float64", VOCAB_SIZE, 64)

    def __init__(self, asked, fail_after=None, signal_after=None):
        self.asked = asked
        self.fail_after = fail_after
        self.signal_after = signal_after

    def run(self, requests):
        for number, request in enumerate(requests):
            if number == self.fail_after:
                raise EngineError("the table fell down")
            if number == self.signal_after:
                os.kill(os.getpid(), signal.SIGTERM)
            self.asked.append(request)
            yield self.rows(request)

    def rows(self, request):
        tokens = list(request.token_ids)
        if request.max_new_tokens:
            rng = np.random.default_rng(request.seed)
            tokens += [OPEN_ID, *rng.integers(5, 40, 6).tolist(), CLOSE_ID, 7, END_ID]
            tokens = tokens[: len(request.token_ids) + request.max_new_tokens]
        first = 1 if request.capture_prompt else len(request.token_ids)
        ids, logprobs = [], []
        for last, token in zip(tokens[first - 1 : -1], tokens[first:], strict=True):
            row = row_over(last)
            ids.append([token, *np.argsort(-row)[:8]])
            logprobs.append(row[ids[-1]])
        ended = tokens[-1] == END_ID
        reason = "scored" if not request.max_new_tokens else "stop" if ended else "length"
        return TeacherRows(
            request.request_id,
            np.array(tokens, np.int32),
            len(request.token_ids),
            first,
            np.array(ids, np.int32),
            np.array(logprobs, np.float32),
            reason,
        )

    def close(self):
        pass


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_teacher(folder, CHAT)
    config = {"model_type": "qwen3", "vocab_size": VOCAB_SIZE, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def asked(monkeypatch):
    """Requests that teachers got; `asked.teacher` changes how the next one behaves."""

    class Asked(list):
        teacher = TableTeacher

    requests = Asked()
    monkeypatch.setattr(prepare, "_start", lambda *_: requests.teacher(requests))
    return requests


def write_prompts(path, num_prompts, first=0):
    rows = [{"id": f"p{n}", "prompt": f"a {n}", "answer": n} for n in range(first, num_prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(model, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 6)
    return GenerateConfig(
        model=model, prompts=prompts, out=tmp_path / "cache", top_k=8, max_new_tokens=20
    )


def names(asked):
    return [request.request_id for request in asked]


def test_every_prompt_becomes_a_trace_with_its_sections_and_fields(config, asked):
    report = generate(config)
    assert (report.num_traces, report.sealed, report.num_unfinished) == (6, True, 0)
    traces = read_all(open_cache(str(config.out)))
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


def test_entry_t_is_the_distribution_over_token_t(config, asked):
    generate(replace(config, capture_prompt=True, mass=1.0))
    for trace in read_all(open_cache(str(config.out))).values():
        for t in range(1, trace.n_total):
            ids, logprobs = trace.logprobs(t)
            expected = row_over(int(trace.token_ids[t - 1]))[ids]
            shifted = row_over(int(trace.token_ids[t]))[ids]
            near = expected > expected.max() - 5
            assert np.abs(logprobs - expected)[near].max() < 0.05
            assert np.abs(logprobs - shifted)[near].max() > 0.05


def test_what_is_finished_is_not_asked_again(config, asked):
    asked.teacher = lambda requests: TableTeacher(requests, fail_after=4)
    with pytest.raises(EngineError, match="fell down"):
        generate(config)
    assert names(asked) == ["p0", "p1", "p2", "p3"]
    asked.clear()
    asked.teacher = TableTeacher
    report = generate(config)
    assert names(asked) == ["p4", "p5"]
    assert (report.num_traces, report.survey.num_taken, report.sealed) == (2, 6, True)
    assert len(read_all(open_cache(str(config.out)))) == 6


def test_a_stop_signal_keeps_what_is_finished_and_says_which_it_was(config, asked):
    asked.teacher = lambda requests: TableTeacher(requests, signal_after=3)
    report = generate(config)
    assert report.stopped_by == signal.SIGTERM
    assert not report.sealed
    asked.clear()
    asked.teacher = TableTeacher
    assert generate(config).num_traces == 3
    assert len(read_all(open_cache(str(config.out)))) == 6


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["seal_cache", "publish"])
def test_a_stop_signal_while_the_cache_is_finished_is_answered_too(
    config, asked, monkeypatch, signum, moment
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
        report = generate(config)
    assert (report.stopped_by, report.sealed, report.num_traces) == (signum, False, 6)
    asked.teacher = None  # nothing is left for a teacher
    assert generate(config).sealed
    assert len(read_all(open_cache(str(config.out)))) == 6


def test_a_trial_run_leaves_the_cache_open_for_the_rest(config, asked):
    trial = generate(replace(config, limit=2))
    assert (trial.num_traces, trial.sealed, trial.survey.num_wanted) == (2, False, 6)
    asked.clear()
    report = generate(config)
    assert names(asked) == ["p2", "p3", "p4", "p5"]
    assert report.sealed


def test_a_complete_capture_run_again_starts_no_teacher(config, asked):
    generate(config)
    asked.teacher = None  # would fail when called
    report = generate(config)
    assert (report.num_traces, report.sealed) == (0, True)


def test_new_prompts_for_a_sealed_cache_are_refused(config, asked):
    generate(config)
    asked.teacher = None
    write_prompts(config.prompts, 8)
    with pytest.raises(CacheMismatchError, match="is sealed, and 2 of 8 traces are not in it"):
        generate(config)


@pytest.mark.parametrize("change", [{"top_k": 4}, {"seed": 1}, {"temperature": 0.5}, {"mass": 0.5}])
def test_another_captures_folder_is_refused_before_the_teacher_starts(config, asked, change):
    generate(replace(config, limit=1))
    asked.teacher = None
    (name,) = change
    with pytest.raises(CacheMismatchError, match=name):
        generate(replace(config, **change))


def test_a_changed_prompt_under_an_old_id_is_refused(config, asked):
    generate(replace(config, limit=3))
    config.prompts.write_text('{"id": "p0", "prompt": "b b b"}\n')
    with pytest.raises(SourceError, match=r"'p0' is in .* already, made from other content"):
        generate(config)


def test_samples_of_a_prompt_have_their_own_names_and_seeds(config, asked):
    generate(replace(config, samples_per_prompt=3))
    assert len(names(asked)) == 18
    assert names(asked)[:3] == ["p0#0", "p0#1", "p0#2"]
    assert len({request.seed for request in asked}) == 18
    assert (
        len({trace.token_ids.tobytes() for trace in read_all(open_cache(str(config.out))).values()})
        == 18
    )


def test_seeds_do_not_depend_on_what_else_is_captured(config, asked):
    generate(replace(config, limit=1))
    alone = asked[0]
    asked.clear()
    write_prompts(config.prompts, 6)
    generate(replace(config, out=config.out.parent / "other"))
    assert next(r for r in asked if r.request_id == alone.request_id).seed == alone.seed


def test_a_cut_chain_of_thought_is_kept_and_counted(config, asked):
    report = generate(replace(config, max_new_tokens=4))
    assert report.num_unfinished == 6
    for trace in read_all(open_cache(str(config.out))).values():
        assert trace.finish_reason == "length"
        assert trace.answer_start == trace.n_total


def test_generation_stops_at_a_budget_that_counts_the_prompt(config, asked):
    with config.prompts.open("a") as file:
        file.write('{"id": "long", "prompt": "a 1 2 3 4 5 6 7"}\n')
    report = generate(replace(config, stop_at_tokens=6, max_new_tokens=None))
    cache = open_cache(str(config.out))
    traces = read_all(cache)

    assert report.num_unfinished == len(traces) == 6  # the long prompt leaves no room
    assert {trace.n_total for trace in traces.values()} == {6}
    assert all(trace.finish_reason == "length" for trace in traces.values())
    assert cache.header.sampling["stop_at_tokens"] == 6
    with pytest.raises(CacheMismatchError, match="stop_at_tokens"):
        generate(replace(config, stop_at_tokens=7, max_new_tokens=None))


def test_the_smaller_of_two_budgets_counts(config, asked):
    generate(replace(config, stop_at_tokens=30, max_new_tokens=4))
    assert {request.max_new_tokens for request in asked} == {4}


def test_a_bad_row_stops_a_strict_capture_before_the_teacher_starts(config, asked):
    asked.teacher = None
    with config.prompts.open("a") as file:
        file.write('{"prompt": ""}\n')
    with pytest.raises(SourceError, match=r"prompts\.jsonl:7: the prompt is empty"):
        generate(replace(config, strict=True))
    assert not config.out.exists()


def test_rows_that_are_left_out_are_said_and_listed_before_the_teacher_starts(
    config, asked, caplog
):
    with config.prompts.open("a") as file:
        file.write('{"id": "x", "prompt": ""}\nnonsense\n{"prompt": " "}\n')
    listed = config.out / "rejects.jsonl"

    def start(requests):
        assert listed.exists()
        assert "left out: 2 rows, empty-prompt, e.g. " in caplog.text
        assert "left out: 1 rows, not-json, e.g. " in caplog.text
        assert f"all 3 rows left out are listed in {listed}" in caplog.text
        return TableTeacher(requests)

    asked.teacher = start
    report = generate(config)
    assert (report.num_traces, report.survey.num_rejected, report.sealed) == (6, 3, True)
    rejects = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(r["row"], r["id"], r["reason"]) for r in rejects] == [
        (7, "x", "empty-prompt"),
        (8, None, "not-json"),
        (9, None, "empty-prompt"),
    ]


def test_an_input_without_a_usable_row_says_why(config, asked):
    config.prompts.write_text('{"text": "a"}\n{"text": "b"}\n{"prompt": ""}\n')
    with pytest.raises(
        SourceError, match=r"found none \(2 of 3 rows: unknown-columns, e\.g\. .*:1: "
    ):
        generate(config)
    assert not config.out.exists()


def test_only_the_ids_of_a_file_are_captured_and_missing_ones_said(config, asked, caplog):
    ids = config.prompts.with_name("ids.txt")
    ids.write_text("p4\nnowhere\n\np1\n")
    report = generate(replace(config, ids_file=ids))
    assert names(asked) == ["p1", "p4"]
    assert "not there of the ids asked for: 1, nowhere" in caplog.text
    assert (report.survey.num_wanted, report.sealed) == (2, True)


def test_an_empty_input_is_refused(config, asked):
    config.prompts.write_text("\n")
    with pytest.raises(SourceError, match="at least one usable row"):
        generate(config)


@pytest.mark.parametrize("capture_prompt", [True, False])
def test_scoring_keeps_the_tokens_that_were_given(config, asked, capture_prompt, tmp_path):
    traces = tmp_path / "traces.jsonl"
    row = {"id": "x", "prompt": "a b c", "response": "<think> d </think> 5"}
    traces.write_text(json.dumps(row))
    score(
        ScoreConfig(
            model=config.model,
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
def scoring(config, asked, tmp_path):
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
        score(ScoreConfig(model=config.model, traces=traces, out=out, top_k=8, **changes))
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


def test_a_given_trace_that_was_cut_is_flagged_and_counted(config, asked, tmp_path):
    traces = tmp_path / "traces.jsonl"
    traces.write_text('{"id": "x", "prompt": "a", "response": "<think> b c"}')
    report = score(ScoreConfig(model=config.model, traces=traces, out=tmp_path / "scored", top_k=8))
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


def test_both_modes_store_the_same_entries_for_the_same_tokens(config, asked, tmp_path):
    generate(replace(config, capture_prompt=True))
    generated = read_all(open_cache(str(config.out)))
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
    score(ScoreConfig(model=config.model, traces=traces, out=tmp_path / "scored", top_k=8))
    scored = read_all(open_cache(str(tmp_path / "scored")))
    for name, trace in generated.items():
        for column in ("token_ids", "k", "top_ids", "top_logits", "tail_logit"):
            np.testing.assert_array_equal(getattr(trace, column), getattr(scored[name], column))


def test_one_worker_of_several_leaves_the_seal_to_the_end(config, asked):
    assert not generate(replace(config, worker="a")).sealed
    seal_cache(config.out)
    assert len(open_cache(str(config.out)).traces) == 6


def test_a_model_folder_may_be_spelt_in_another_way(config, asked):
    generate(replace(config, limit=2))
    assert generate(replace(config, model=config.model + "/.")).num_traces == 4


@pytest.mark.parametrize(
    "bad", [{"top_k": 0}, {"top_k": 255}, {"mass": 0.0}, {"mass": 1.5}, {"think_open": ""}]
)
def test_settings_outside_their_range_are_refused(config, bad):
    with pytest.raises(ValueError, match="expected"):
        replace(config, **bad)


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


def test_memory_does_not_grow_with_the_number_of_prompts(config, asked, monkeypatch, tmp_path):
    monkeypatch.setattr(writer, "MAX_DECODED_BYTES", 1 << 20)  # of a journal: small shards
    asked.teacher = LongTraces
    few, many = (
        peak_bytes_of_capture(config, number, tmp_path / str(number)) for number in (20, 120)
    )
    rows_bytes = 2000 * 9 * 8  # of one trace, as the teacher gives them
    assert few > rows_bytes
    assert (many - few) / 100 < rows_bytes / 40  # names, hashes and records remain
