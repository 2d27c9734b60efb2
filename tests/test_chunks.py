"""Approximate likelihood matching: chunks of derived caches, their loss, and a run on them."""

import json
from dataclasses import replace

import loss_cases
import numpy as np
import pytest
import torch
from fakes import make_cache, make_trace
from students import make_model, make_student

from student_train.batch.chunks import WholeChunks
from student_train.batch.loss_tokens import Teaching
from student_train.batch.micro_batch import micro_batches
from student_train.data.tokens import LossDropout, TokenSelection
from student_train.losses import (
    ChunkTargets,
    Objective,
    chunk_divergence,
    chunk_likelihood_loss,
    sparse_kl_per_token,
)
from student_train.run.config import TrainConfig
from student_train.run.loop import train
from teacher_cache.format import CacheFormatError, CacheMismatchError, open_cache

NONE = float("nan")
CHUNKS = Teaching(hard_labels=True, chunks=True)
DERIVED = {"derived": {"fingerprint": "f", "tokenizer_fingerprint": "g", "chunks": True}}


def chunked(trace, lengths=(1, 3, 1, 2), unknown=(2,), seed=0):
    """A trace whose response is cut into chunks of these lengths, in turn; the rest is in none."""
    rng = np.random.default_rng(seed)
    column = np.full(len(trace), np.nan, np.float32)
    column[trace.cot_start - 1] = 1
    place, number = trace.cot_start - 1, 0
    while place + lengths[number % len(lengths)] < len(trace) - 1:
        place += lengths[number % len(lengths)]
        column[place] = 1 if number in unknown else -rng.exponential(2)
        number += 1
    return replace(trace, chunk_logprob=column)


def definition(student_nats, teacher_nats, temperature):
    """The divergence as the paper has it, times the temperature; plain Python in float64."""
    import math

    a, b = math.exp(-teacher_nats / temperature), math.exp(-student_nats / temperature)
    rest = 0.0 if a == 1 else (1 - a) * math.log((1 - a) / (1 - b))
    return temperature * (a * math.log(a / b) + rest)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 100.0])
def test_the_divergence_is_that_of_the_definition_and_vanishes_at_the_teacher(temperature):
    nats = [0.01, 0.5, 3.0, 40.0]
    pairs = [(student, teacher) for student in nats for teacher in [0.0, *nats]]
    student, teacher = (-torch.tensor(side, dtype=torch.float64) for side in zip(*pairs))  # noqa: B905
    expected = [definition(*pair, temperature) for pair in pairs]
    found = chunk_divergence(student, teacher, temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert (found >= -1e-12).all()
    assert chunk_divergence(student, student, temperature).abs().max() < 1e-12
    single = chunk_divergence(student.float(), teacher.float(), temperature)
    np.testing.assert_allclose(single, expected, rtol=1e-3, atol=2e-5)


def test_at_high_temperatures_it_has_the_limit_that_it_says():
    student, teacher = torch.tensor([2.0, 0.7], dtype=torch.float64), torch.tensor([1.5, 3.0])
    limit = teacher * (teacher / student).log() - teacher + student
    torch.testing.assert_close(
        chunk_divergence(-student, -teacher.double(), 1e6), limit.double(), rtol=1e-5, atol=0
    )


def test_a_student_or_a_teacher_that_is_certain_gives_finite_values_and_gradients():
    student = torch.tensor([-0.0, -1e-9, -3.0], requires_grad=True)
    loss = chunk_divergence(student, torch.tensor([-2.0, -0.0, -0.0]), 100.0)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_gradients_through_the_head_are_right(ce_weight):
    hidden, weight, targets, token_weight = loss_cases.ragged_case()
    targets = loss_cases.without_distributions(targets, [1, 2])
    chunks = ChunkTargets(
        torch.tensor([0, 0, 1, 3, 2, 2, 2, 3]),  # 3: in none
        torch.tensor([-2.5, -0.4, -3.0], dtype=torch.float64),
        torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64),
    )

    def loss(hidden, weight):
        ce = sparse_kl_per_token(hidden, weight, targets, Objective(ce_weight=1.0)).loss
        return chunk_likelihood_loss(
            ce, token_weight, chunks, ce_weight=ce_weight, temperature=10.0
        )

    operands = tuple(operand.clone().requires_grad_() for operand in (hidden, weight))
    assert torch.autograd.gradcheck(loss, operands)
    ce = -torch.log_softmax(hidden @ weight.T, 1).gather(1, targets.target_ids[:, None].long())[
        :, 0
    ]
    nats = [ce[:2].sum(), ce[2], ce[4:7].sum()]
    pairs = zip(nats, chunks.logprob, chunks.weight, strict=True)
    divergence = sum(float(w) * definition(float(n), -float(p), 10.0) for n, p, w in pairs)
    expected = (1 - ce_weight) * divergence + ce_weight * float((ce * token_weight).sum())
    assert loss(hidden, weight).item() == pytest.approx(expected, rel=1e-12)


def test_chunks_of_a_trace_are_used_where_they_are_known_and_whole():
    trace = make_trace("t", 12)  # the response begins at 3
    column = [NONE, NONE, 1, -1.0, NONE, -2.0, NONE, 1, -3.0, NONE, NONE, NONE]
    trace = replace(trace, chunk_logprob=np.array(column, np.float32))

    found = WholeChunks.of(trace, np.arange(3, 12))
    assert found.of_token.tolist() == [0, 1, 1, -1, -1, 2, -1, -1, -1]
    assert found.logprob.tolist() == [-1, -2, -3]
    assert WholeChunks.of(trace, np.array([3, 5, 8])).of_token.tolist() == [0, -1, 1]
    with pytest.raises(ValueError, match="'t' has no chunk_logprob"):
        WholeChunks.of(make_trace("t", 12), np.arange(3, 12))


@pytest.mark.parametrize("hard_labels", [True, False])
@pytest.mark.parametrize("mask", [None, LossDropout(0.3, seed=1, epoch=0)])
def test_a_batch_holds_the_whole_chunks_of_its_loss_tokens(hard_labels, mask):
    traces = [chunked(make_trace(f"t{n}", 20 + 9 * n, without_entries=(12,))) for n in range(4)]
    selected = TokenSelection(lead_span=0.8).selected(traces)
    batches = micro_batches(
        selected, batch_tokens=70, loss_reduction="sequence", mask=mask, layout="packed",
        teaching=Teaching(hard_labels=hard_labels, chunks=True),
    )  # fmt: skip
    assert len(batches) > 1
    for batch in batches:
        num_chunks = len(batch.chunks.logprob)
        sizes = torch.bincount(batch.chunks.chunk_of, minlength=num_chunks + 1)
        assert set(sizes[:-1].tolist()) <= {1, 2, 3}
        assert num_chunks > 0
        for chunk in range(num_chunks):
            places = batch.hidden_index[batch.chunks.chunk_of == chunk]
            assert (places.diff() == 1).all()
            weight = batch.token_weight[batch.chunks.chunk_of == chunk]
            assert (weight == batch.chunks.weight[chunk]).all()
        assert batch.num_hard_labels == (sizes[-1] if hard_labels else 0)
        assert (batch.num_left_out > 0) == (not hard_labels)
        if not hard_labels:
            assert sizes[-1] == 0


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    traces = [chunked(make_trace(f"t{n}", 24 + n, without_entries=(15,))) for n in range(8)]
    return make_cache(tmp_path_factory.mktemp("chunks") / "cache", traces, **DERIVED)


def test_a_cache_keeps_the_column_whole_or_cut(cache):
    opened = open_cache(cache)
    assert opened.header.has_chunks
    for n in range(8):
        expected = chunked(make_trace(f"t{n}", 24 + n)).chunk_logprob
        np.testing.assert_array_equal(opened[f"t{n}"].chunk_logprob, expected)
        np.testing.assert_array_equal(opened[f"t{n}"][:9].chunk_logprob, expected[:9])


def test_a_column_that_holds_no_logprobs_is_refused(tmp_path):
    trace = make_trace("t", 24)
    wrong = replace(trace, chunk_logprob=np.full(24, 0.5, np.float32))
    cache = open_cache(make_cache(tmp_path / "cache", [wrong], **DERIVED))
    with pytest.raises(CacheFormatError, match="chunk_logprob must be NaN, 1, or finite"):
        _ = cache["t"]
    with pytest.raises(ValueError, match="'t': expected chunk_logprob, got none"):
        make_cache(tmp_path / "other", [trace], **DERIVED)
    unknown = replace(trace, student_logprob=np.ones(24, np.float32))  # 1 is no mark here
    cache = open_cache(make_cache(tmp_path / "own", [unknown], rollout={"round": 1}))
    with pytest.raises(CacheFormatError, match="student_logprob must be NaN or finite"):
        _ = cache["t"]


@pytest.mark.parametrize("ce_weight", [0.0, 0.25])
def test_a_run_minimises_what_the_formula_says(cache, tmp_path, caplog, ce_weight):
    caplog.set_level("INFO")
    config = TrainConfig(
        cache=(cache,), student=make_student(tmp_path / "student"), out=tmp_path / "run",
        match="chunks", chunk_temperature=20.0, ce_weight=ce_weight, max_steps=1, batch_traces=8,
        batch_tokens=60, tracker="none",
    )  # fmt: skip
    train(config)
    (found,) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())

    model, total, num_tokens, num_alone = make_model().double(), 0.0, 0, 0
    for trace in open_cache(cache):
        ids = torch.from_numpy(trace.token_ids).long()
        logprobs = torch.log_softmax(model(ids[None]).logits[0, :-1], -1)
        nats = -logprobs.gather(1, ids[1:, None])[:, 0].detach()
        first = trace.cot_start
        for end in np.flatnonzero(~np.isnan(trace.chunk_logprob)):
            if trace.chunk_logprob[end] <= 0:
                own = nats[first - 1 : end].sum().item()
                value = definition(own, -float(trace.chunk_logprob[end]), 20.0)
                total += (1 - ce_weight) * value
                num_tokens += end + 1 - first
            first = end + 1
        if ce_weight:  # of the prompt too, which has distributions here
            total += ce_weight * nats.sum().item()
            num_alone += len(nats)
    num_loss = num_alone if ce_weight else num_tokens
    assert found["tokens"] == num_loss
    assert found["loss"] == pytest.approx(total / num_loss, rel=1e-5)
    counts = (found["num_hard_labels"], found["num_left_out_tokens"])
    assert (counts[0] > 0, counts[1] > 0) == (ce_weight > 0, ce_weight == 0)
    assert "without a chunk of known likelihood" in caplog.text or ce_weight
    assert found["kl"] > 0  # the divergence over tokens is still shown
    card = (tmp_path / "run/model/README.md").read_text()
    assert f"{1 - ce_weight:g} divergence of chunk likelihoods at temperature 20" in card


def test_chunks_are_refused_where_there_are_none(tmp_path):
    config = TrainConfig(
        cache=(make_cache(tmp_path / "cache", [make_trace("t", 24)]),),
        student=make_student(tmp_path / "student"), out=tmp_path / "run", match="chunks",
    )  # fmt: skip
    with pytest.raises(CacheMismatchError, match="holds no likelihoods of chunks"):
        train(config)
    for wrong, message in (
        ({"match": "tokens", "chunk_temperature": 3.0}, "it is that of --match chunks"),
        ({"loss_dropout": 0.5}, "takes the likelihood of its whole chunk along"),
        ({"divergence": "jsd"}, "--divergence: it belongs to distributions over tokens"),
        ({"loss_temperature": 2.0, "tail": "renormalise"}, "--tail: it belongs"),
        ({"live_teacher": "x"}, "--live-teacher: it belongs"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(config, **wrong)
