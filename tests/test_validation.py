"""Held-out traces during a run, and which student they choose."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import make_cache, make_trace, make_traces
from students import make_student
from transformers import AutoModelForCausalLM

from student_train.data.draw import SpanFigures, draw_spans
from student_train.data.tokens import TokenSelection
from student_train.data.traces import open_data
from student_train.errors import NonFiniteLossError
from student_train.run import validation
from student_train.run.config import TrainConfig
from student_train.run.loop import train
from teacher_cache.format import open_cache


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validation")
    return TrainConfig(
        cache=(make_cache(folder / "cache", make_traces(40)),),
        student=make_student(folder / "student"), out=folder / "run", lr=3e-3, batch_traces=4,
        heldout_share=0.25, save_every=1000,
    )  # fmt: skip


def metrics_of(config):
    return [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]


def kl_by_hand(model, trace, first, end):
    """Mean over the tokens first..end of a trace, from the dense logits, with a tail bucket."""
    ids = torch.from_numpy(trace.token_ids.astype(np.int64))
    log_q = model(ids[None]).logits[0].double().log_softmax(dim=-1)
    sums = []
    for t in range(max(1, first), end):
        top_ids, logprobs = trace.logprobs(t)
        log_p = torch.from_numpy(logprobs)
        q = log_q[t - 1, torch.from_numpy(top_ids.astype(np.int64))]
        tail_p, tail_q = -torch.expm1(log_p.logsumexp(0)), -torch.expm1(q.logsumexp(0))
        sums.append((log_p.exp() * (log_p - q)).sum() + tail_p * (tail_p.log() - tail_q.log()))
    return torch.stack(sums)


@pytest.mark.slow
def test_heldout_figures_are_of_whole_traces_and_of_the_student_that_is_written(base, tmp_path):
    config = replace(base, out=tmp_path / "run", lead_span=0.5, max_steps=2, sections=("cot",))
    train(config)

    model = AutoModelForCausalLM.from_pretrained(config.out / "model")
    traces = list(open_data(config.cache, heldout_share=0.25).heldout_traces())
    whole = torch.cat([kl_by_hand(model, t, 1, t.n_total) for t in traces])
    answers = torch.cat([kl_by_hand(model, t, t.answer_start, t.n_total) for t in traces])
    metrics = metrics_of(config)[-1]
    assert metrics["heldout_kl"] == pytest.approx(whole.mean().item(), rel=1e-4)
    assert metrics["heldout_kl_answer"] == pytest.approx(answers.mean().item(), rel=1e-4)
    assert {"heldout_nll_cot", "heldout_top1_agreement_prompt"} <= metrics.keys()
    assert "heldout_kl" not in metrics_of(config)[0]
    assert (
        f"| heldout_kl | {metrics['heldout_kl']:.4f} |"
        in (config.out / "model/README.md").read_text()
    )


@pytest.mark.slow
def test_the_best_student_is_written_and_its_checkpoint_kept(base, tmp_path):
    # The rate rises far too high, so that later steps make it worse.
    config = replace(
        base, out=tmp_path / "run", lr=1.0, warmup=1.0, eval_every=1,
        select="heldout", max_steps=6,
    )  # fmt: skip
    train(config)
    last = replace(config, out=tmp_path / "last", select="last")
    train(last)

    metrics = metrics_of(config)
    best = min(metrics, key=lambda values: values["heldout_kl"])
    assert best["step"] < 6
    folders = sorted(path.name for path in (config.out / "checkpoints").iterdir())
    assert folders == [f"step-{best['step']:09d}", "step-000000006"]
    state = torch.load(config.out / "checkpoints" / folders[0] / "state.pt", weights_only=True)
    weights = AutoModelForCausalLM.from_pretrained(config.out / "model").state_dict()
    assert torch.equal(weights["model.norm.weight"], state["student"]["model.norm.weight"])
    others = AutoModelForCausalLM.from_pretrained(last.out / "model").state_dict()
    assert not torch.equal(weights["model.norm.weight"], others["model.norm.weight"])
    assert f"After step {best['step']}, " in (config.out / "model/README.md").read_text()


@pytest.mark.slow
def test_measuring_changes_nothing(base, tmp_path):
    quiet = replace(base, out=tmp_path / "quiet", max_steps=4)
    often = replace(base, out=tmp_path / "often", max_steps=4, eval_every=1)
    train(quiet)
    train(often)

    for one, other in zip(metrics_of(quiet), metrics_of(often), strict=True):
        assert one["loss"] == other["loss"]


@pytest.mark.slow
def test_another_cache_gives_the_heldout_traces(base, tmp_path, caplog):
    fresh = make_cache(tmp_path / "fresh", make_traces(6, seed=3))
    config = replace(
        base,
        out=tmp_path / "run",
        heldout_share=0.0,
        heldout_cache=fresh,
        heldout_traces=4,
        max_steps=1,
    )
    train(config)

    model = AutoModelForCausalLM.from_pretrained(config.out / "model")
    infos = open_cache(fresh).shards[0].traces
    keep = {row: infos[row].n_total for row in range(4)}
    traces = open_cache(fresh).read(0, keep).values()
    expected = torch.cat([kl_by_hand(model, t, 1, t.n_total) for t in traces])
    assert metrics_of(config)[-1]["heldout_kl"] == pytest.approx(expected.mean().item(), rel=1e-4)
    assert "6 held-out traces are trained on too" in caplog.text  # their ids are t0, t1, ...


def test_a_cache_that_is_trained_on_measures_nothing(base, tmp_path):
    config = replace(base, out=tmp_path / "run", heldout_share=0.0, heldout_cache=base.cache[0])
    with pytest.raises(ValueError, match="it is trained on; name another"):
        train(config)


def test_heldout_traces_without_a_distribution_are_refused(base, tmp_path):
    bare = [make_trace(f"bare{n}", 30, without_entries=range(30)) for n in range(3)]
    empty = str(make_cache(tmp_path / "bare", bare))
    config = replace(base, out=tmp_path / "run", heldout_share=0.0, heldout_cache=empty)
    with pytest.raises(ValueError, match="none of 3 held-out traces has a token with a distrib"):
        train(config)


def test_heldout_traces_longer_than_the_student_are_refused(base, tmp_path):
    student = make_student(tmp_path / "student", max_position_embeddings=32)
    config = replace(base, out=tmp_path / "run", student=student, trace_tokens=10)
    with pytest.raises(ValueError, match=r"held-out trace 't\d+' has .*--where 'n_total <= 33'"):
        train(config)


@pytest.mark.parametrize("change", [{"eval_every": 5}, {"select": "heldout"}])
def test_measuring_without_heldout_traces_is_refused(base, change):
    with pytest.raises(ValueError, match="expected held-out traces"):
        replace(base, heldout_share=0.0, **change)


@pytest.mark.slow
@pytest.mark.parametrize("select", ["heldout", "last"])
@pytest.mark.parametrize("figure", [math.nan, math.inf])
def test_a_heldout_kl_that_is_no_number_stops_the_run(base, tmp_path, monkeypatch, select, figure):
    real, calls = validation.section_figures, []

    def section_figures(sums):
        calls.append(None)
        found = real(sums)
        return {**found, "all": replace(found["all"], kl=figure)} if len(calls) == 2 else found

    monkeypatch.setattr(validation, "section_figures", section_figures)
    config = replace(base, out=tmp_path / "run", eval_every=2, select=select, save_every=3)
    with pytest.raises(
        NonFiniteLossError, match=rf"the held-out KL is {figure}; expected a number"
    ):
        train(config)
    assert not (config.out / "model").exists()
    monkeypatch.undo()
    assert train(config).num_steps == 8


def test_the_share_of_the_chain_of_thought_is_said(base, tmp_path, caplog):
    traces = [make_trace("a", 100), make_trace("b", 40)]  # the middle halves are the reasoning
    (source,) = open_data([make_cache(tmp_path / "cache", traces)]).sources

    def cot_share(selection):
        return SpanFigures.of([draw_spans(source, selection, seed=0)]).cot_share

    assert cot_share(TokenSelection(0.5)) == pytest.approx(35 / 70)
    assert cot_share(TokenSelection(0.5, sections=("prompt",))) == 0.0
    assert cot_share(TokenSelection()) == 1.0

    caplog.set_level("INFO")
    config = replace(base, out=tmp_path / "run", max_steps=1, lead_span=0.5)
    train(config)
    share = metrics_of(config)[0]["cot_share"]
    assert 0.4 < share < 0.6
    assert f"{100 * share:.1f} % of the chains of thought" in caplog.text
    assert math.isfinite(metrics_of(config)[0]["heldout_kl"])
