"""Rollouts: what a student writes, what `score` makes of it, and what both refuse."""

import json
import math
import os
import signal
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from small_teachers import CHAT, make_teacher
from transformers import AutoModelForCausalLM

from student_train.errors import InterruptedRunError
from student_train.evaluation.completions import Completion, Sample
from student_train.rounds import rollout as rollout_module
from student_train.rounds.rollout import roll_out
from student_train.rounds.rollout_config import RolloutConfig
from teacher_cache.capture.configs import ScoreConfig
from teacher_cache.capture.score import score
from teacher_cache.format import open_cache
from teacher_cache.sources import BadRow, RowColumns, SourceError, TraceRenderer
from teacher_cache.sources.tokenizer import ModelFiles, TeacherTokenizer

TOOLS = Path(__file__).parent.parent / "tools"
STUDENT, TEACHER = str(TOOLS / "base-student"), str(TOOLS / "tiny-teacher")


def config_of(out, **changes):
    settings = {
        "model": STUDENT, "prompts": out.parent / "prompts.jsonl", "out": out,
        "max_new_tokens": 60, "samples_per_prompt": 2, "batch_size": 4,
    }  # fmt: skip
    return RolloutConfig(**settings | changes)


def write_prompts(folder, rows):
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def rolled(tmp_path_factory):
    """Two traces of each of five prompts, without answers; some are cut."""
    folder = tmp_path_factory.mktemp("rollout")
    rows = lines_of(TOOLS / "prompts" / "train.jsonl")[:5]
    write_prompts(folder, [{"messages": row["messages"], "kind": row["operands"]} for row in rows])
    result = roll_out(config_of(folder / "rollouts.jsonl", max_new_tokens=90))
    return folder / "rollouts.jsonl", result


@pytest.fixture(scope="module")
def scored(rolled, tmp_path_factory):
    out = tmp_path_factory.mktemp("scored") / "cache"
    config = ScoreConfig(
        traces=rolled[0], model=TEACHER, out=str(out), engine="transformers", capture_prompt=False
    )
    assert score(config).num_traces == 10
    return open_cache(str(out))


@pytest.fixture(scope="module")
def render(rolled):
    teacher = TeacherTokenizer(ModelFiles(TEACHER, None), {})
    facts = lines_of(rolled[0])[0]["rollout"]
    return TraceRenderer(teacher, 10**6, 10**6, RowColumns(), rollout=facts)


@pytest.mark.slow
def test_rows_hold_the_student_s_own_tokens_and_logprobs(rolled):
    file, result = rolled
    rows, model = lines_of(file), AutoModelForCausalLM.from_pretrained(STUDENT)
    assert len({row["id"] for row in rows}) == result.num_traces == 10
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    settings = json.loads(file.with_name(f"{file.name}.settings.json").read_text())
    assert settings["dtype"] == "float32"  # of the weights, whatever an engine would take
    for row in rows:
        ids, first = torch.tensor([row["token_ids"]]), row["num_prompt"]
        with torch.no_grad():
            logprobs = model(ids).logits.double().log_softmax(-1)[0, first - 1 : -1]
        expected = logprobs.gather(1, ids[0, first:, None])[:, 0]
        np.testing.assert_allclose(row["student_logprobs"], expected, atol=1e-5)
        assert (row["finish_reason"] == "length") == (len(expected) == 90)
    assert result.unfinished_share == sum(r["finish_reason"] == "length" for r in rows) / 10


@pytest.mark.slow
def test_a_cache_of_them_says_whose_they_are_and_holds_their_logprobs(rolled, scored):
    rows = {row["id"]: row for row in lines_of(rolled[0])}
    header = scored.header
    assert (header.rollout["round"], header.rollout["temperature"]) == (1, 1.0)
    assert (
        header.rollout["student_fingerprint"] == rows[min(rows)]["rollout"]["student_fingerprint"]
    )
    assert header.teacher == TEACHER
    for trace_id, row in rows.items():
        trace, first = scored[trace_id], row["num_prompt"]
        assert trace.token_ids.tolist() == row["token_ids"]
        assert np.isnan(trace.student_logprob[:first]).all()
        np.testing.assert_allclose(
            trace.student_logprob[first:], row["student_logprobs"], rtol=1e-6
        )
        assert (trace.k[first:] > 0).all()
        assert not trace.k[:first].any()
        is_closed = "</think>" in row["response"]
        assert trace.cot_start == first
        assert (trace.answer_start < len(trace)) == is_closed
        assert (trace.finish_reason == "length") == (row["finish_reason"] == "length")
        assert trace.fields == {"kind": row["kind"]}
        assert scored.messages(trace_id)["messages"] == row["messages"]
        assert trace[: first + 3].student_logprob.shape == (first + 3,)


@pytest.mark.parametrize(
    ("change", "reason", "message"),
    [
        (lambda r: r["messages"][0].update(content="Sum?"), "prompt-differs", "template makes"),
        (lambda r: r.update(response=r["response"] + " "), "text-changes", "to the student"),
        (lambda r: r.update(student_logprobs=[-0.5]), "bad-logprobs", "one for each of the"),
        (lambda r: r["student_logprobs"].__setitem__(0, 0.5), "bad-logprobs", "at most 0"),
        (lambda r: r["student_logprobs"].__setitem__(0, math.nan), "bad-logprobs", "finite"),
        (lambda r: r.update(num_prompt=0), "bad-bounds", "expected 1 to"),
        (lambda r: r.update(finish_reason="ended"), "bad-response", "finish_reason"),
        (lambda r: r["rollout"].update(round=2), "other-rollout", "round: 2 here, 1 there"),
        (lambda r: r.pop("rollout"), "other-rollout", "the row is no rollout"),
    ],
)
def test_rows_that_the_teacher_would_read_differently_are_left_out(
    rolled, render, change, reason, message
):
    row = lines_of(rolled[0])[0]
    assert render(json.loads(json.dumps(row))).num_prompt == row["num_prompt"]
    change(row)
    with pytest.raises(BadRow, match=message) as error:
        render(row)
    assert error.value.reason == reason


def test_a_teacher_of_another_tokenizer_is_refused_before_it_starts(rolled, tmp_path):
    make_teacher(tmp_path, CHAT)
    config = ScoreConfig(traces=rolled[0], model=str(tmp_path), out=str(tmp_path / "cache"))
    with pytest.raises(SourceError, match=r"whose tokenizer .* is not the teacher's"):
        score(config)
    assert not (tmp_path / "cache").exists()


def test_completions_of_an_evaluation_are_refused_with_what_to_do(render):
    completion = Completion("5", num_tokens=1, finished=True)
    row = asdict(Sample(0, 0, None, "5", True, "number", True, completion))
    plain = TraceRenderer(render.tokenizer, 10**6, 10**6, RowColumns())
    with pytest.raises(BadRow, match="let `train-student rollout` write"):
        plain(row)


@pytest.mark.slow
def test_a_stopped_rollout_continues_to_the_same_traces(rolled, tmp_path, monkeypatch):
    (tmp_path / "prompts.jsonl").write_bytes((rolled[0].parent / "prompts.jsonl").read_bytes())
    file = tmp_path / "r.jsonl"
    traces = rollout_module._traces

    def stopped(*arguments):
        for number, trace in enumerate(traces(*arguments)):
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield trace

    monkeypatch.setattr(rollout_module, "_traces", stopped)
    with pytest.raises(InterruptedRunError, match="of 10 traces; they are in"):
        roll_out(config_of(file, max_new_tokens=90))
    assert 3 <= len(lines_of(file)) < 10
    with file.open("ab") as torn:
        torn.write(b'{"id": "x", "tok')
    monkeypatch.setattr(rollout_module, "_traces", traces)
    assert roll_out(config_of(file, max_new_tokens=90)) == rolled[1]
    by_id = [sorted(lines_of(each), key=lambda row: row["id"]) for each in (file, rolled[0])]
    assert by_id[0] == by_id[1]
    with pytest.raises(ValueError, match=r"traces of another rollout \(temperature: 1.0 before"):
        roll_out(config_of(file, max_new_tokens=90, temperature=0.5))
    with pytest.raises(ValueError, match=r"another rollout \(round: 1 before, 2 now"):
        roll_out(config_of(file, max_new_tokens=90, round=2))


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{"prompt": "a"}, {"prompt": "a"}], {}, r"jsonl:2: it has the prompt of .*jsonl:1"),
        ([{"id": 1, "prompt": "a"}, {"id": "1", "prompt": "b"}], {}, "its id '1' is that of"),
        ([{"prompt": "a"}], {"skip": 1}, "at least one prompt after the first 1"),
        ([{"question": "a"}], {}, "expected a text `prompt`"),
    ],
)
def test_prompts_that_cannot_be_rolled_out_are_named(tmp_path, rows, changes, message):
    write_prompts(tmp_path, rows)
    with pytest.raises(ValueError, match=message):
        roll_out(config_of(tmp_path / "r.jsonl", **changes))
