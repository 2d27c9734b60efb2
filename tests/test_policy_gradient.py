"""The one-sample estimator: against its definition in float64, and against what it estimates."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import make_trace, make_traces
from students import make_model

from student_train.batch.micro_batch import one_micro_batch
from student_train.data.tokens import TokenSelection
from student_train.losses import (
    Objective,
    sampled_token_loss,
    sparse_kl,
    staleness,
    teacher_logprob_of_labels,
)
from student_train.losses.head import HeadProducts
from student_train.model.load import output_layer
from student_train.model.own_traces import OWN_SUMS, OwnTraces


def logits(num_rows, num_vocab, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, num_vocab, generator=generator, dtype=torch.float64)


def test_gradients_are_those_of_the_definition():
    nll = logits(24, 1, 0)[:, 0].abs().requires_grad_()
    rollout, teacher = -logits(24, 1, 1)[:, 0].abs(), -logits(24, 1, 2)[:, 0].abs()
    found = sampled_token_loss(nll, rollout, teacher, ratio_clip=0.2)
    advantage, ratio = teacher + nll.detach(), torch.exp(-nll.detach() - rollout)
    expected = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    (gradient,) = torch.autograd.grad(found.loss.sum(), nll)
    outside = ((advantage > 0) & (ratio > 1.2)) | ((advantage < 0) & (ratio < 0.8))

    torch.testing.assert_close(found.loss.detach(), expected)
    torch.testing.assert_close(gradient, torch.where(outside, 0.0, ratio * advantage))
    assert torch.equal(found.is_clipped, outside)
    assert outside.any()
    assert (~outside).any()


@pytest.mark.parametrize("rollout_seed", [3, 7])  # today's student, and another
def test_the_mean_gradient_over_all_samples_is_that_of_the_reverse_kl(rollout_seed):
    values, log_p = logits(1, 9, 3).requires_grad_(), logits(1, 9, 4).log_softmax(1)[0]
    rollout = logits(1, 9, rollout_seed).log_softmax(1)[0]
    q = values.detach().softmax(1)[0]
    gap = q.log() - log_p
    expected = q * (gap - (q * gap).sum())  # of sum q (log q - log p) by each logit, by hand
    each = sampled_token_loss(-values.log_softmax(1)[0], rollout, log_p, ratio_clip=1e9).loss
    (found,) = torch.autograd.grad((rollout.exp() * each).sum(), values)

    torch.testing.assert_close(found[0], expected)


def test_staleness_has_the_kl_from_rollout_to_student_as_its_mean():
    before, now = logits(1, 9, 5).log_softmax(1)[0], logits(1, 9, 6).log_softmax(1)[0]
    each = staleness(-now, before)

    torch.testing.assert_close((before.exp() * each).sum(), (before.exp() * (before - now)).sum())
    assert (each >= 0).all()
    assert (staleness(-before, before) == 0).all()


def test_the_teacher_s_logprob_of_a_token_is_the_trace_s():
    traces = make_traces(4)
    batch = one_micro_batch(TokenSelection().selected(traces))
    found = teacher_logprob_of_labels(batch.targets).numpy()
    rows = sorted(traces, key=lambda trace: -len(trace))
    expected = [
        float(entries.logprobs[entries.ids == trace.token_ids[t]][0])
        for trace in rows
        for t in np.flatnonzero(trace.k)
        for entries in [trace.logprobs(int(t))]
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def sampled(trace, first, seed=0):
    """The trace as a student's own from its token `first` on."""
    column = np.full(len(trace), np.nan, np.float32)
    column[first:] = -np.random.default_rng(seed).exponential(1.5, len(trace) - first)
    return replace(trace, student_logprob=column)


@pytest.fixture(scope="module")
def mixed():
    """A batch of a teacher's trace and a student's, hidden states, and which tokens are its own."""
    traces = [make_trace("given", 30, seed=1), sampled(make_trace("own", 26, seed=2), 7)]
    batch = one_micro_batch(TokenSelection().selected(traces))
    weight = output_layer(make_model()).weight.detach().double()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch.num_valid, weight.shape[1], generator=generator).double()
    return batch, hidden, weight, ~batch.rollout_logprob.isnan()


def test_own_tokens_have_the_divergence_without_the_cross_entropy(mixed):
    batch, hidden, weight, is_own = mixed
    assert (int(is_own.sum()), len(is_own)) == (19, 29 + 25)
    objective = Objective("reverse_kl", ce_weight=0.5)
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, parts, sums = OwnTraces(None).loss(hidden, weight, None, batch, objective)
    found = torch.autograd.grad(loss, (hidden, weight))
    whole = sparse_kl(hidden, weight, batch.targets, batch.token_weight, objective)
    expected = torch.where(is_own, whole.kl, 0.5 * whole.kl + 0.5 * whole.ce).sum()
    both = [
        sparse_kl(
            hidden, weight, batch.targets, batch.token_weight * mask,
            replace(objective, ce_weight=ce_weight),
        ).loss
        for mask, ce_weight in ((is_own, 0.0), (~is_own, 0.5))
    ]  # fmt: skip

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, torch.autograd.grad(sum(both), (hidden, weight)))
    for name in ("kl", "ce", "student_mass", "teacher_mass", "top1"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
    named = dict(zip(OWN_SUMS, sums.tolist(), strict=True))
    each = staleness(whole.ce, batch.rollout_logprob.double())
    assert named["staleness"] == pytest.approx(float(each[is_own].sum()))
    assert (named["own_tokens"], named["clipped_share"]) == (19, 0)


def test_own_tokens_have_the_policy_gradient_and_others_the_objective(mixed):
    batch, hidden, weight, is_own = mixed
    hidden = hidden.clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    objective = Objective(ce_weight=0.5)
    loss, parts, sums = OwnTraces(0.2).loss(hidden, weight, None, batch, objective)
    found = torch.autograd.grad(loss, (hidden, weight))
    whole = sparse_kl(hidden, weight, batch.targets, batch.token_weight, objective)
    logprobs = (hidden @ weight.T).log_softmax(1)
    nll = -logprobs.gather(1, batch.targets.target_ids.long()[:, None])[:, 0]
    rollout, teacher = batch.rollout_logprob.double(), teacher_logprob_of_labels(batch.targets)
    own = sampled_token_loss(nll[is_own], rollout[is_own], teacher[is_own], ratio_clip=0.2)
    given = sparse_kl(hidden, weight, batch.targets, batch.token_weight * ~is_own, objective)
    expected = torch.autograd.grad(own.loss.sum() + given.loss, (hidden, weight))

    torch.testing.assert_close(loss, own.loss.sum() + given.loss)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(parts.kl, whole.kl)
    assert dict(zip(OWN_SUMS, sums.tolist(), strict=True))["clipped_share"] == int(
        own.is_clipped.sum()
    )


@pytest.mark.parametrize("ratio_clip", [None, 0.2])
@pytest.mark.parametrize("whose", ["own", "given", "both"])
def test_the_head_has_one_gradient_whoever_wrote_the_tokens(mixed, monkeypatch, ratio_clip, whose):
    """It is the largest tensor of a step: [V, D] in float32."""
    batch, hidden, weight, is_own = mixed
    if whose != "both":
        rollout = batch.rollout_logprob.masked_fill(is_own, torch.nan)
        rollout = rollout if whose == "given" else torch.full_like(rollout, -1.5)
        batch = replace(batch, rollout_logprob=rollout)
    made, new = [], HeadProducts.__init__

    def counted(self, *arguments):
        new(self, *arguments)
        made.append(self.grad_weight is not None)

    monkeypatch.setattr(HeadProducts, "__init__", counted)
    small = slice(0, 3)
    operands = [hidden[:, small].clone(), weight[:, small].clone(), weight[:, 4].clone()]
    for operand in operands:
        operand.requires_grad_()

    def loss(hidden, weight, bias):
        return OwnTraces(ratio_clip).loss(hidden, weight, bias, batch, Objective(ce_weight=0.3))[0]

    loss(*operands).backward()
    assert sum(made) == 1
    if ratio_clip is None:  # else the advantage is a constant, which differences cannot know
        assert torch.autograd.gradcheck(loss, operands, fast_mode=True)
