"""What a profile says of a student and a cache, against the definitions."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fakes import make_cache, make_traces
from hypothesis import given
from hypothesis import strategies as st
from students import make_family, make_model, make_student

from student_train.cli.group import cli
from student_train.data.traces import open_data
from student_train.losses import target_ranks
from student_train.model.forward import StudentWithLoss
from student_train.model.heldout import heldout_figures
from student_train.model.load import head_of
from student_train.profile.advice import MIXTURE, Advice
from student_train.profile.choice import chosen_places
from student_train.profile.figures import (
    LEAD_SPANS,
    Coverage,
    cache_row,
    position_rows,
    section_rows,
    trace_row,
)
from student_train.profile.measure import measured
from teacher_cache.format import lead_span_length, stored_logprobs

TRACES = make_traces(30)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def student():
    model = make_model().eval()
    return StudentWithLoss(model, head_of(model)).eval()


@pytest.fixture(scope="module")
def measures(student):
    return list(measured(student, TRACES, CPU, 0))


@pytest.fixture(scope="module")
def dense(student):
    """[n, V] the student's log-probabilities of every trace."""
    ids = [torch.from_numpy(trace.token_ids.astype(np.int64))[None] for trace in TRACES]
    with torch.no_grad():
        return [student.model(i).logits[0].double().log_softmax(-1).numpy() for i in ids]


@pytest.mark.slow
def test_every_token_is_measured_by_the_definitions(measures, dense):
    for trace, log_q, one in zip(TRACES, dense, measures, strict=True):
        ends = np.cumsum(trace.k, dtype=np.int64)
        logprobs = stored_logprobs(trace.k, trace.top_logits, trace.tail_logit)
        for place, token in enumerate(one.token_N):
            own = slice(ends[token] - int(trace.k[token]), ends[token])
            log_p, q = logprobs[own], log_q[token - 1]
            tail = 1 - np.exp(log_p).sum()
            q_tail = 1 - np.exp(q[trace.top_ids[own]]).sum()
            kl = (np.exp(log_p) * (log_p - q[trace.top_ids[own]])).sum()
            kl += tail * np.log(tail / q_tail)
            entropy = -(np.exp(log_p) * log_p).sum() - tail * np.log(tail)
            realised = trace.token_ids[token]
            assert one.divergence_N[place] == pytest.approx(kl, abs=1e-5)
            assert one.entropy_N[place] == pytest.approx(entropy, abs=1e-5)
            assert one.tail_N[place] == pytest.approx(tail, abs=1e-6)
            assert one.nll_N[place] == pytest.approx(-q[realised], abs=1e-5)
            assert one.rank_N[place] == 1 + (q > q[realised]).sum()
            assert one.k_N[place] == trace.k[token]


def test_means_are_those_of_the_held_out_figures(student, measures):
    figures = heldout_figures(student, TRACES, CPU)
    rows = {row["section"]: row for row in section_rows(measures)}
    for section in ("prompt", "cot", "answer"):
        assert rows[section]["num_tokens"] == figures[section].num_tokens
        assert rows[section]["divergence"] == pytest.approx(figures[section].kl, rel=1e-5)
        assert rows[section]["nll"] == pytest.approx(figures[section].nll, rel=1e-5)
    assert sum(row["divergence_share"] for row in rows.values()) == pytest.approx(1)
    assert sum(row["divergence_share"] for row in position_rows(measures)) == pytest.approx(1)


@given(
    logits=st.lists(st.lists(st.integers(-3, 3), min_size=7, max_size=7), min_size=1, max_size=5),
    target=st.integers(0, 6),
    largest=st.integers(1, 9),
)
def test_ranks_are_what_sorting_gives(logits, target, largest):
    rows = torch.tensor(logits, dtype=torch.float32)
    ids = torch.full((len(rows),), target)
    ranks = target_ranks(rows, torch.eye(7), ids, largest=largest)
    expected = [min(largest, sorted(row, reverse=True).index(row[target]) + 1) for row in logits]
    assert ranks.tolist() == expected


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_a_cap_or_a_scale_of_the_logits_moves_no_rank(family):
    model = make_family(family).eval()
    student = StudentWithLoss(model, head_of(model)).eval()
    (one,) = measured(student, TRACES[:1], CPU, 0)
    ids = torch.from_numpy(TRACES[0].token_ids.astype(np.int64))[None]
    with torch.no_grad():
        logits = model(ids).logits[0, one.token_N - 1]
    of_target = logits.gather(1, ids[0, one.token_N][:, None])
    assert one.rank_N.tolist() == (1 + (logits > of_target).sum(dim=1)).tolist()


def test_what_lies_before_a_lead_span_is_what_training_on_it_would_see(measures):
    coverage = Coverage.of(measures, seed=0)
    total = sum(one.divergence_N.sum() for one in measures)
    for index, span in enumerate(LEAD_SPANS):
        before = sum(
            one.divergence_N[one.token_N < lead_span_length(one.n_total, span)].sum()
            for one in measures
        )
        low, high = coverage.interval(index)
        assert coverage.share_S[index] == pytest.approx(before / total)
        assert low <= coverage.share_S[index] <= high
    assert coverage.share_S[-1] == 1.0


def coverage_of(shares, spread=0.0):
    share_S = np.interp(LEAD_SPANS, *zip(*shares, strict=True))
    moved = share_S + spread * np.random.default_rng(0).normal(size=(1000, 1))
    return Coverage(share_S, share_S, moved.clip(0, 1))


def test_an_early_signal_is_worth_a_fixed_span_and_a_late_one_a_mixture():
    early = Advice.of(coverage_of([(0, 0), (0.4, 0.95), (1, 1)]), 200)
    late = Advice.of(coverage_of([(0, 0), (0.8, 0.3), (1, 1)]), 200)

    assert (early.lead_span, early.mean_lead_span) == ("0.4", 0.4)
    assert (late.lead_span, late.mean_lead_span) == (str(MIXTURE), pytest.approx(0.5))
    assert early.is_sure
    assert late.is_sure
    assert "--lead-span 0.375:4,1:1" in late.sentence


def test_what_is_not_sure_is_said():
    few = Advice.of(coverage_of([(0, 0), (0.8, 0.3), (1, 1)]), 20)
    near = Advice.of(coverage_of([(0, 0), (0.5, 0.9), (1, 1)], spread=0.05), 200)

    assert not few.is_sure
    assert "50 traces or more" in few.sentence
    assert not near.is_sure
    assert "not sure" in near.sentence


def test_the_ratio_of_rank_and_surprisal_is_the_papers(measures):
    rows = [trace_row(one) for one in measures]
    for one, row in zip(measures, rows, strict=True):
        of = one.section_N > 0
        assert row["rank_surprisal_ratio"] == pytest.approx(
            one.rank_N[of].sum() / one.nll_N[of].sum()
        )
    ranks, nlls = ([row[name] for row in rows] for name in ("student_rank", "student_nll"))
    whole = cache_row(measures, seed=0)
    assert whole["rank_surprisal_ratio"] == pytest.approx(np.mean(ranks) / np.mean(nlls))
    assert whole["rank_surprisal_ratio_low"] < whole["rank_surprisal_ratio"]


@pytest.mark.slow
def test_traces_come_out_of_few_shards_and_are_the_same_again(tmp_path):
    path = make_cache(tmp_path / "cache", make_traces(120), traces_per_shard=4)
    (source,) = open_data([path]).sources
    chosen = chosen_places(source, 20, seed=0)

    assert chosen == chosen_places(source, 20, seed=0) != chosen_places(source, 20, seed=1)
    assert len(set(chosen)) == 20
    assert set(chosen) <= set(source.train)
    assert len({shard for shard, _ in chosen}) <= 10
    assert sorted(chosen_places(source, 1000, seed=0)) == sorted(source.train)


@pytest.mark.slow
def test_the_command_writes_tables_page_and_traces(tmp_path):
    caches = [
        make_cache(tmp_path / name, make_traces(12, seed=seed)) for seed, name in enumerate("ab")
    ]
    words = ["profile", "--student", make_student(tmp_path / "student"), "--num-traces", "10"]
    for cache in caches:
        words += ["--cache", cache]
    result = CliRunner().invoke(cli, [*words, "--out", str(tmp_path / "out")])

    assert result.exit_code == 0, result.output
    assert "Recommended: --lead-span" in result.output
    tables = json.loads((tmp_path / "out/profile.json").read_text())
    assert tables["num_traces"] == 20
    ratios = [row["rank_surprisal_ratio"] for row in tables["caches"]]
    assert ratios == sorted(ratios)
    assert {row["cache"] for row in tables["caches"]} == set(caches)
    lines = [json.loads(line) for line in (tmp_path / "out/traces.jsonl").read_text().splitlines()]
    assert len(lines) == 20
    assert [line["rank_surprisal_ratio"] for line in lines] == sorted(
        line["rank_surprisal_ratio"] for line in lines
    )
    page = (tmp_path / "out/profile.html").read_text()
    assert page.count('<svg class="chart"') == 4
    assert all(cache in page for cache in caches)
    assert tables["advice"]["lead_span"] in page
