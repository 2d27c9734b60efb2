"""What a student learns that has nothing but this loss."""

import loss_cases
import pytest
import torch

from student_train.losses import Objective, sparse_kl

NUM_CONTEXTS, NUM_VOCAB = 6, 29


def trained_student(targets, objective):
    """A table of logits per context: what it converges to, nothing but the loss decides."""
    generator = torch.Generator().manual_seed(1)
    shape = (NUM_CONTEXTS, NUM_VOCAB)
    student = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    identity = torch.eye(NUM_VOCAB, dtype=torch.float64)
    weight = torch.ones(NUM_CONTEXTS)
    optimizer = torch.optim.LBFGS(
        [student],
        max_iter=800,
        tolerance_grad=1e-12,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = sparse_kl(student, identity, targets, weight, objective).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.softmax(student.detach(), dim=1)


def teacher(k):
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_CONTEXTS, NUM_VOCAB)
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.softmax(logits, dim=1), loss_cases.targets_of(logits, k, dtype=torch.float64)


def kept_mass(probs, targets):
    kept = targets.kept()
    return torch.where(kept, probs.gather(1, targets.top_ids.clamp(min=0)), 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mix"), [d for d in loss_cases.DIVERGENCES if d[0] != "tvd"], ids=str
)
def test_a_student_converges_to_the_teacher_the_mass_of_its_tail_included(name, mix):
    probs, targets = teacher([1, 2, 3, 5, 8, 13])
    student = trained_student(targets, Objective(name, mix, ce_weight=0.0))
    difference = kept_mass(student, targets) - kept_mass(probs, targets)
    assert difference.abs().max() < 1e-6
    tails = [1 - kept_mass(each, targets).sum(dim=1) for each in (student, probs)]
    torch.testing.assert_close(*tails, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("tail", ["renormalise", "zero"])
def test_without_a_bucket_the_students_tail_is_trained_away(tail):
    probs, targets = teacher(5)
    student = kept_mass(trained_student(targets, Objective(tail=tail, ce_weight=0.0)), targets)
    expected = kept_mass(probs, targets)
    assert (student.sum(dim=1) > 0.999).all()
    torch.testing.assert_close(
        student, expected / expected.sum(dim=1, keepdim=True), rtol=1e-2, atol=1e-3
    )


@pytest.mark.slow
def test_with_cross_entropy_the_student_converges_to_the_mixture():
    probs, targets = teacher(29)
    student = trained_student(targets, Objective(ce_weight=0.25))
    label = torch.nn.functional.one_hot(targets.target_ids, NUM_VOCAB)
    torch.testing.assert_close(student, 0.75 * probs + 0.25 * label, rtol=1e-5, atol=1e-7)
