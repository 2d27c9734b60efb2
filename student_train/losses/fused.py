"""The two autograd functions of the loss: gradients formed in the forward, or in the backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from student_train.losses.chunks import Gradients, Problem, Wanted, multiply_in_place, run
from student_train.losses.rows import RowResults
from student_train.objective import Objective


class _Context(FunctionCtx):
    """The context that autograd hands to both passes, and our fields on it."""

    saved_tensors: tuple[Tensor, Tensor, Tensor | None, Tensor]
    needs_input_grad: tuple[bool, ...]
    problem: Problem
    wanted: Wanted
    gradients: Gradients | None


class ScalarLoss(torch.autograd.Function):
    """sum_n row_weight_n loss_n and [N] parts, with the gradients formed in the forward."""

    @staticmethod
    def forward(
        ctx: _Context,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        row_weight_N: Tensor,
        problem: Problem,
        wanted: Wanted,
    ) -> tuple[Tensor, ...]:
        """Loss, then the fields of `RowResults`; `wanted` are the gradients to form."""
        weight = row_weight_N if any(wanted) else None
        results, gradients = run(problem, hidden_ND, weight_VD, bias_V, weight, wanted)
        loss_N = _losses(problem, results)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, row_weight_N)  # type: ignore[arg-type]  # None is allowed
        ctx.problem, ctx.wanted, ctx.gradients = problem, wanted, gradients
        return _outputs(ctx, (loss_N * row_weight_N).sum(dtype=loss_N.dtype), results)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_loss: Tensor, *_parts: None) -> tuple[Tensor | None, ...]:
        """The gradients of the forward, times the upstream one."""
        hidden_ND, weight_VD, bias_V, row_weight_N = ctx.saved_tensors
        # Drop our references: autograd copies a gradient that something else still refers to.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # a second backward through a retained graph
            _, gradients = run(ctx.problem, hidden_ND, weight_VD, bias_V, row_weight_N, ctx.wanted)
        return (
            _scaled(gradients.hidden, grad_loss, hidden_ND),
            _scaled(gradients.weight, grad_loss, weight_VD),
            _scaled(gradients.bias, grad_loss, bias_V),
            None,
            None,
            None,
        )


class PerTokenLoss(torch.autograd.Function):
    """loss_n and its parts, all [N], with the logits formed again in the backward."""

    @staticmethod
    def forward(
        ctx: _Context,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        problem: Problem,
    ) -> tuple[Tensor, ...]:
        """Losses, then the fields of `RowResults`."""
        results, _ = run(problem, hidden_ND, weight_VD, bias_V, None, (False, False, False))
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V)  # type: ignore[arg-type]  # as above
        ctx.problem = problem
        return _outputs(ctx, _losses(problem, results), results)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_loss_N: Tensor, *_parts: None) -> tuple[Tensor | None, ...]:
        """The same rows, weighted by their upstream gradients."""
        hidden_ND, weight_VD, bias_V = ctx.saved_tensors[:3]
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        _, gradients = run(ctx.problem, hidden_ND, weight_VD, bias_V, grad_loss_N, wanted)
        return (
            _scaled(gradients.hidden, None, hidden_ND),
            _scaled(gradients.weight, None, weight_VD),
            _scaled(gradients.bias, None, bias_V),
            None,
        )


def _losses(problem: Problem, results: RowResults) -> Tensor:
    """[N] losses, each by the objective of its part."""
    losses, start = [], 0
    for objective, targets in problem.parts:
        losses.append(mixed_loss(objective, results.of(slice(start, start + len(targets)))))
        start += len(targets)
    return losses[0] if len(losses) == 1 else torch.cat(losses)


def mixed_loss(objective: Objective, results: RowResults) -> Tensor:
    """[N] losses of divergence and cross entropy; a part of weight 0 may be infinite."""
    if objective.ce_weight == 0:
        return results.kl.clone()  # the part is a constant, the loss is not
    if objective.ce_weight == 1:
        return results.ce.clone()
    return (1 - objective.ce_weight) * results.kl + objective.ce_weight * results.ce


def _outputs(ctx: _Context, loss: Tensor, results: RowResults) -> tuple[Tensor, ...]:
    """The loss, and the parts as constants."""
    parts = (results.kl, results.ce, results.student_mass, results.top1)
    ctx.mark_non_differentiable(*parts)
    return (loss, *parts)


def _scaled(gradient: Tensor | None, factor: Tensor | None, like: Tensor | None) -> Tensor | None:
    """The gradient times the factor, in the dtype of `like`; in place if that is its dtype."""
    if gradient is None or like is None:
        return None
    if factor is None:
        return gradient.to(like.dtype)
    if gradient.dtype != like.dtype:
        out = torch.empty_like(gradient, dtype=like.dtype)
        return torch.mul(gradient, factor, out=out)
    multiply_in_place(gradient, factor)
    return gradient
