"""How far rounding takes the loss from float64, where it is hard: near the teacher, and when sure.

The yardstick is the plain formula in the same dtype, so a bound holds wherever a fixed tolerance
would be too wide near the teacher and too narrow far from it.
"""

import loss_cases
import pytest
import torch

from student_train.losses import Objective, sparse_kl, sparse_kl_per_token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharpness", [1, 3])
@pytest.mark.parametrize("distance", [1, 1e-2, 1e-4])
def test_error_is_at_most_twice_that_of_the_plain_formula(dtype, distance, sharpness):
    case = loss_cases.distillation_case(dtype, distance, sharpness)
    errors, allowed = loss_cases.errors_and_yardstick(*case)
    assert all(error <= limit for error, limit in zip(errors, allowed, strict=True))
    if dtype == torch.bfloat16:
        assert max(errors[1:]) < 3e-3  # the rounding of the results alone is 2e-3


def test_a_small_divergence_is_not_drowned_by_rounding():
    hidden, weight, targets = loss_cases.distillation_case(torch.float32, 1e-6, 1)
    got = sparse_kl_per_token(hidden, weight, targets).kl.double()
    truth = sparse_kl_per_token(
        hidden.double(), weight.double(), loss_cases.as_dtype(targets, torch.float64)
    ).kl
    assert truth.mean() < 2e-6
    assert (got >= 0).all()
    torch.testing.assert_close(got.sum(), truth.sum(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("student_tail", [1e-3, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_value_and_gradient_are_exact_however_small_the_students_tail(name, student_tail):
    # Two kept ids; all else is the tail, at logits that give it just this mass.
    rest = torch.full((5,), student_tail / 5, dtype=torch.float64).log()
    logits = torch.cat([torch.tensor([0.7, 0.3], dtype=torch.float64).log(), rest])[None]
    teacher = torch.tensor([[0.0, -1.0, -3.0, -3.5, -4.0, -4.5, -5.0]])
    targets = loss_cases.targets_of(teacher, 2)
    results = {}
    for dtype in (torch.float32, torch.float64):
        student = logits.to(dtype).requires_grad_()
        identity = torch.eye(7, dtype=dtype)
        objective = Objective(divergence=name, ce_weight=0.0)
        loss = sparse_kl(student, identity, targets, torch.ones(1), objective).loss
        results[dtype] = loss.detach(), torch.autograd.grad(loss, student)[0]
    for got, truth in zip(results[torch.float32], results[torch.float64], strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=2e-6, atol=0)


@pytest.mark.parametrize("objective", list(loss_cases.allowed_objectives()), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_finite_losses_and_gradients(objective, dtype):
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (12, 9), generator=generator) * 2.0 - 1
    teacher = 20 * torch.randn(12, 9, generator=generator)
    targets = loss_cases.targets_of(teacher, [1, 2, 3, 8] * 3, [4] * 12)
    student = (1e4 * signs).to(dtype).requires_grad_()
    weight = torch.eye(9, dtype=dtype).requires_grad_()
    output = sparse_kl(student, weight, targets, torch.ones(12), Objective(**objective))
    output.loss.backward()
    for tensor in (output.kl, output.ce, student.grad, weight.grad):
        assert tensor.isfinite().all()


def test_a_nearly_certain_label_keeps_its_gradient():
    student = torch.tensor([[20.0, 0.0, -1.0]], requires_grad=True)
    targets = loss_cases.targets_of(torch.tensor([[3.0, 1.0, 0.0]]), 2)
    label_alone = Objective(ce_weight=1.0)
    loss = sparse_kl(student, torch.eye(3), targets, torch.ones(1), label_alone).loss
    loss.backward()
    expected = torch.softmax(student.detach().double()[0], dim=0)
    expected[0] = -expected[1:].sum()
    torch.testing.assert_close(student.grad[0].double(), expected, rtol=1e-6, atol=0)
