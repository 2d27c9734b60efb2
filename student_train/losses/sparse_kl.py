"""Loss of a linear head against a cached teacher: the functions that a trainer calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from student_train.losses.chunks import Problem
from student_train.losses.fused import PerTokenLoss, ScalarLoss
from student_train.losses.targets import TeacherTargets
from student_train.losses.vocab_parallel import VocabShard
from student_train.objective import DEFAULT_OBJECTIVE, Objective

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _outside_graphs(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`torch.compiler.disable`, which has no types."""
    disabled: Callable[_P, _R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


@dataclass(frozen=True)
class SparseKLOutput:
    """A loss and, detached, its parts. In nats.

    Attributes:
        loss: [] from `sparse_kl`, [N] from `sparse_kl_per_token`; the one to differentiate.
        kl: [N] the divergence times the squared temperature.
        ce: [N] cross entropy with the target token, at temperature 1.
        student_mass: [N] the student's probability of the kept ids, at temperature 1.
        teacher_mass: [N] the teacher's, as stored.
        top1: [N] bool, True where the teacher's likeliest token is the student's.

    Of a token without a distribution, kl and both masses are 0, and top1 is False.
    """

    loss: Tensor
    kl: Tensor
    ce: Tensor
    student_mass: Tensor
    teacher_mass: Tensor
    top1: Tensor


@_outside_graphs
def sparse_kl(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets: TeacherTargets,
    token_weight_N: Tensor,
    objective: Objective = DEFAULT_OBJECTIVE,
    *,
    bias: Tensor | None = None,
    chunk_bytes: int | None = None,
    shard: VocabShard | None = None,
    has_zero_weights: bool = True,
) -> SparseKLOutput:
    """Distillation loss of a linear head, without the logits of all tokens.

        loss = sum_n token_weight_n ((1 - ce_weight) D_n + ce_weight CE_n)

    D_n is the divergence between teacher and student at token n, CE_n the cross entropy with the
    target token; `Objective` defines both, and ce_weight. To average over loss tokens give each
    the weight 1 / num_loss_tokens, counted over the whole step, all ranks and micro-batches
    included.

    The gradients of hidden_ND, weight_VD and bias, where they are required, are formed here, at
    three matrix products in all. Tokens of weight 0 are taken out first and cost nothing; finding
    them is the one point at which a GPU is waited for, and `has_zero_weights` spares it. Inside
    `torch.compile` this is a graph break. Under autocast operands are rounded as
    `torch.nn.functional.linear` would. Logits, losses and the sum over tokens in the weight's
    gradient are float32, or float64 for float64 operands.

    Args:
        hidden_ND: [N, D] float, the body's outputs at the positions that predict the tokens.
        weight_VD: [V, D] the head's weight, of the same dtype unless under autocast. If it is
            sharded by `fully_shard`, call this inside the forward of the sharded module. With LoRA
            on the head, give the sum of weight and update.
        targets: The teacher's rows.
        token_weight_N: [N] float, without a gradient.
        objective: Divergence, tail, temperature and ce_weight, and what the head does to its
            outputs. By default half forward KL and half cross entropy, as in arXiv 2512.21002.
        bias: [V] or None.
        chunk_bytes: Bound on the buffers for logits; one row always fits. None is 896 MiB on
            CUDA and 96 MiB elsewhere.
        shard: This process' part of the vocabulary, if weight_VD and bias are only a part.
        has_zero_weights: False where the caller knows that no token has weight 0; one that has it
            all the same costs as much as any other.

    Returns:
        The loss and its parts; the parts of a token of weight 0 are 0, its teacher_mass apart.

    Raises:
        ValueError: If arguments do not fit together.
    """
    dtype = _check_operands(hidden_ND, weight_VD, bias, targets, chunk_bytes, shard)
    _check_token_weight(hidden_ND, token_weight_N)
    rows, kept_targets = None, targets
    if has_zero_weights:
        rows = token_weight_N.nonzero()[:, 0]
        if len(rows) == len(targets):
            rows = None
    if rows is not None:
        hidden_ND, token_weight_N = hidden_ND.index_select(0, rows), token_weight_N[rows]
        kept_targets = targets.select(rows)
    wanted = (_wants(hidden_ND), _wants(weight_VD), bias is not None and _wants(bias))
    problem = Problem(((objective, kept_targets),), dtype, chunk_bytes, shard)
    loss, *parts = ScalarLoss.apply(  # type: ignore[no-untyped-call]  # torch has no types for it
        hidden_ND, weight_VD, bias, token_weight_N, problem, wanted
    )
    if rows is not None:
        parts = [part.new_zeros(len(targets)).index_copy(0, rows, part) for part in parts]
    return _output(loss, parts, targets)


@_outside_graphs
def sparse_kl_of_two(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets: TeacherTargets,
    token_weight_N: Tensor,
    objectives: tuple[Objective, Objective],
    is_second_N: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_bytes: int | None = None,
) -> SparseKLOutput:
    """`sparse_kl` with one of two objectives for each token.

    The head's weight has one gradient: a call for each objective would form two, [V, D] in float32.
    Arguments are those of `sparse_kl`. Finding each objective's tokens is where a GPU is waited
    for; a token of weight 0 costs as much as any other, and a live teacher's distributions are
    formed for all tokens at once.

    Args:
        hidden_ND: [N, D].
        weight_VD: [V, D].
        targets: The teacher's rows.
        token_weight_N: [N].
        objectives: The first and the second one.
        is_second_N: [N] bool, True for the tokens of the second one.
        bias: [V] or None.
        chunk_bytes: Bound on the buffers for logits.

    Returns:
        The loss and its parts, these in the order of the tokens.

    Raises:
        ValueError: If arguments do not fit together.
    """
    dtype = _check_operands(hidden_ND, weight_VD, bias, targets, chunk_bytes, None)
    _check_token_weight(hidden_ND, token_weight_N)
    if is_second_N.dtype != torch.bool or is_second_N.shape != token_weight_N.shape:
        raise ValueError(
            f"is_second_N: expected bool {tuple(token_weight_N.shape)}, found "
            f"{is_second_N.dtype} {tuple(is_second_N.shape)}"
        )
    rows = ((~is_second_N).nonzero()[:, 0], is_second_N.nonzero()[:, 0])
    order = torch.cat(rows)
    parts_of = tuple(
        (objective, targets.select(own)) for objective, own in zip(objectives, rows, strict=True)
    )
    wanted = (_wants(hidden_ND), _wants(weight_VD), bias is not None and _wants(bias))
    loss, *parts = ScalarLoss.apply(  # type: ignore[no-untyped-call]  # torch has no types for it
        hidden_ND.index_select(0, order), weight_VD, bias, token_weight_N[order],
        Problem(parts_of, dtype, chunk_bytes, None), wanted,
    )  # fmt: skip
    parts = [torch.empty_like(part).index_copy(0, order, part) for part in parts]
    return _output(loss, parts, targets)


@_outside_graphs
def sparse_kl_per_token(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets: TeacherTargets,
    objective: Objective = DEFAULT_OBJECTIVE,
    *,
    bias: Tensor | None = None,
    chunk_bytes: int | None = None,
    shard: VocabShard | None = None,
) -> SparseKLOutput:
    """The losses of `sparse_kl` token by token, for the caller to reduce in any way.

    The gradient by each of them is known in the backward pass only, which forms the logits a
    second time: four matrix products instead of three. Arguments are those of `sparse_kl`.

    Returns:
        As `sparse_kl`, with loss [N] = (1 - ce_weight) D_n + ce_weight CE_n.

    Raises:
        ValueError: If arguments do not fit together.
    """
    dtype = _check_operands(hidden_ND, weight_VD, bias, targets, chunk_bytes, shard)
    problem = Problem(((objective, targets),), dtype, chunk_bytes, shard)
    loss, *parts = PerTokenLoss.apply(  # type: ignore[no-untyped-call]  # torch has no types for it
        hidden_ND, weight_VD, bias, problem
    )
    return _output(loss, parts, targets)


def _wants(operand: Tensor) -> bool:
    return torch.is_grad_enabled() and operand.requires_grad


def _output(loss: Tensor, parts: list[Tensor], targets: TeacherTargets) -> SparseKLOutput:
    kl, ce, student_mass, top1 = parts
    teacher_mass = torch.sigmoid(-targets.tail_logit.detach()) * targets.has_distribution()
    return SparseKLOutput(loss, kl, ce, student_mass, teacher_mass, top1)


def _check_operands(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: TeacherTargets,
    chunk_bytes: int | None,
    shard: VocabShard | None,
) -> torch.dtype:
    """Refuse arguments that do not fit; return the dtype of computation."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden_ND and weight_VD: expected [N, D] and [V, D], "
            f"got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if len(targets) != len(hidden):
        raise ValueError(f"targets: expected {len(hidden)} rows, as hidden_ND, got {len(targets)}")
    num_vocab, num_kept = len(weight), targets.top_ids.shape[1]
    if bias is not None and bias.shape != (num_vocab,):
        raise ValueError(f"bias: expected [{num_vocab}], got {list(bias.shape)}")
    if shard is not None:
        stop, num_vocab = shard.start + num_vocab, shard.num_vocab
        if not 0 <= shard.start < stop <= num_vocab:
            raise ValueError(
                f"shard: ids {shard.start} to {stop} are not part of a vocabulary of {num_vocab}"
            )
    if num_kept > num_vocab:
        raise ValueError(f"top_ids: {num_kept} columns, but the head has {num_vocab} outputs")
    if hasattr(weight, "to_local"):
        raise ValueError(
            "weight_VD is a DTensor: call the loss inside the forward of the module that "
            "fully_shard wraps, where the weight is whole"
        )
    for name, operand in (("hidden_ND", hidden), ("targets", targets.top_ids), ("bias", bias)):
        if operand is not None and operand.device != weight.device:
            raise ValueError(f"{name} is on {operand.device} but weight_VD on {weight.device}")
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes: expected at least 1, got {chunk_bytes}")
    return _compute_dtype(hidden, weight)


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    for name, operand in (("hidden_ND", hidden), ("weight_VD", weight)):
        if not operand.is_floating_point():
            raise ValueError(f"{name}: expected a float dtype, got {operand.dtype}")
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden_ND is {hidden.dtype} but weight_VD {weight.dtype}: convert one, "
            "or call under torch.autocast"
        )
    return hidden.dtype


def _check_token_weight(hidden: Tensor, token_weight: Tensor) -> None:
    if token_weight.shape != hidden.shape[:1] or not token_weight.is_floating_point():
        raise ValueError(
            f"token_weight_N: expected {list(hidden.shape[:1])} floats, "
            f"got {list(token_weight.shape)} of {token_weight.dtype}"
        )
    if token_weight.requires_grad:
        raise ValueError(
            "token_weight_N requires a gradient, but is a constant here: detach it, or weight the "
            "losses of sparse_kl_per_token instead"
        )
