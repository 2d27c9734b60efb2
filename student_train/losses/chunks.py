"""The loop over chunks of tokens, so that the logits of all tokens never exist at once.

A chunk's logits are formed, turned into its losses and, in place, into its gradients, which are
multiplied back into the gradients of the head's operands.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from student_train.losses.head import HeadProducts
from student_train.losses.rows import Passes, RowResults, TorchPasses
from student_train.losses.steps import RowSteps
from student_train.losses.targets import TeacherTargets
from student_train.objective import Objective

if TYPE_CHECKING:
    from student_train.losses.triton_fused import FusedRows
    from student_train.losses.vocab_parallel import VocabShard

logger = logging.getLogger(__name__)

# Many rows at a time let the matrix products run at full speed. With a vocabulary of 152k and
# bfloat16 operands this holds the logits of 512 rows and the gradients of 2048, which are
# multiplied together. On a CPU more than 100 to 200 rows gain nothing.
CUDA_CHUNK_BYTES = 896 * 2**20
CHUNK_BYTES = 96 * 2**20
_CUDA_ROW_MULTIPLE = 128
_COLUMN_MULTIPLE = 16
_HALF_HEADROOM = 8  # float16 gradients are scaled to about 2**8, of at most 2**16

Wanted = tuple[bool, bool, bool]


@dataclass(frozen=True)
class Problem:
    """Arguments of a call, apart from the tensors that autograd must see.

    Attributes:
        parts: Objective and targets of some rows, of the rows after these, ...
    """

    parts: tuple[tuple[Objective, TeacherTargets], ...]
    compute_dtype: torch.dtype
    chunk_bytes: int | None
    shard: VocabShard | None


@dataclass(frozen=True)
class Gradients:
    """Gradients of hidden, weight and bias, in the dtype they were accumulated in."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def run(
    problem: Problem,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    row_weight_N: Tensor | None,
    wanted: Wanted,
) -> tuple[RowResults, Gradients]:
    """Results of all rows and, where `wanted`, gradients of their sum weighted by row_weight_N."""
    # The products here have chosen dtypes; autocast must not round them again. Unlike
    # PyTorch, Triton launches on the current GPU, wherever its tensors are.
    current = torch.cuda.device_of(hidden_ND)  # type: ignore[no-untyped-call]  # torch has no types
    with current, torch.autocast(hidden_ND.device.type, enabled=False):
        head = HeadProducts(hidden_ND, weight_VD, bias_V, problem.compute_dtype, wanted)
        exponent = None
        if row_weight_N is not None:
            row_weight_N = row_weight_N.to(head.result_dtype)
            if problem.compute_dtype == torch.float16 and len(row_weight_N):
                exponent = _HALF_HEADROOM - torch.frexp(row_weight_N.abs().max()).exponent
                row_weight_N = torch.ldexp(row_weight_N, exponent)
        num_rows, start = len(hidden_ND), 0
        results = RowResults(
            kl=torch.empty(num_rows, device=hidden_ND.device, dtype=head.result_dtype),
            ce=torch.empty(num_rows, device=hidden_ND.device, dtype=head.result_dtype),
            student_mass=torch.empty(num_rows, device=hidden_ND.device, dtype=head.result_dtype),
            top1=torch.empty(num_rows, device=hidden_ND.device, dtype=torch.bool),
        )
        for part, (_, targets) in enumerate(problem.parts):
            rows = slice(start, start + len(targets))
            weight_R = None if row_weight_N is None else row_weight_N[rows]
            _loop(problem, part, head, weight_R, results.of(rows), start)
            start = rows.stop
        if problem.shard is not None and head.grad_hidden is not None:
            head.grad_hidden = problem.shard.sum_gradients(head.grad_hidden, head.result_dtype)
        gradients = (head.grad_hidden, head.grad_weight, head.grad_bias)
        if exponent is not None:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(torch.ldexp(gradient.new_ones(()), -exponent))
    return results, Gradients(*gradients)


def _loop(
    problem: Problem,
    part: int,
    head: HeadProducts,
    row_weight_R: Tensor | None,
    results: RowResults,
    offset: int,
) -> None:
    """Results of the R rows of a part, chunk by chunk; their gradients go into the head.

    `offset` is the first of them among the rows of the head.
    """
    objective, targets = problem.parts[part]
    num_rows, device, dtype = len(targets), targets.k.device, head.result_dtype
    width = buffer_width(head.num_vocab)
    operation = row_operation(objective, targets, head, row_weight_R, problem.shard)
    # Processes that share a vocabulary must cut at the same rows, whatever the size of their part.
    shard = problem.shard
    planned_width = width if shard is None else buffer_width(shard.even_share)
    row_bytes = operation.row_bytes(planned_width)
    chunk_rows = rows_per_chunk(num_rows, row_bytes, problem.chunk_bytes, device.type)
    product_rows = chunk_rows * operation.chunks_per_product
    buffer = torch.empty(min(chunk_rows, num_rows), width, device=device, dtype=dtype)
    for start in range(0, num_rows, chunk_rows):
        first, stop = start - start % product_rows, min(start + chunk_rows, num_rows)
        logits_CV = buffer[: stop - start]
        head.products_(offset + start, offset + stop, logits_CV[:, : head.num_vocab])
        gradient_PV = operation(first, start, logits_CV, results)
        if gradient_PV is not None and (stop == num_rows or stop == first + product_rows):
            head.accumulate_(offset + first, offset + stop, gradient_PV[:, : head.num_vocab])


def row_operation(
    objective: Objective,
    targets: TeacherTargets,
    head: HeadProducts,
    row_weight_N: Tensor | None,
    shard: VocabShard | None,
) -> RowSteps | FusedRows:
    """The fused kernel where it is made for the case, else passes with PyTorch between them."""
    passes_cls = passes_type(targets.k.device.type)
    if shard is None and targets.top_ids.shape[1] <= passes_cls.max_fused_kept:
        from student_train.losses.triton_fused import FusedRows

        return FusedRows(objective, targets, head, row_weight_N)
    return RowSteps(objective, targets, head, row_weight_N, shard, passes_cls)


def buffer_width(num_vocab: int) -> int:
    """Width of V and at least one more: a dummy column for padding and the like."""
    return (num_vocab // _COLUMN_MULTIPLE + 1) * _COLUMN_MULTIPLE


@functools.cache
def passes_type(device_type: str) -> type[Passes]:
    """Triton's kernels on CUDA where Triton is installed, PyTorch's everywhere else."""
    if device_type != "cuda":
        return TorchPasses
    try:
        from student_train.losses.triton_rows import TritonPasses
    except ImportError as error:
        logger.warning("the loss runs without its Triton kernels, at about half speed: %s", error)
        return TorchPasses
    return TritonPasses


def multiply_in_place(values: Tensor, factor: Tensor) -> None:
    """Multiply by a [] tensor; on CUDA with Triton a factor of 1 costs nothing."""
    if passes_type(values.device.type).max_fused_kept == 0:
        values.mul_(factor)
        return
    from student_train.losses.triton_scale import multiply_

    multiply_(values, factor)


def rows_per_chunk(num_rows: int, row_bytes: int, chunk_bytes: int | None, device_type: str) -> int:
    """Number of rows per chunk: as many as the bound allows, about the same for every chunk."""
    on_cuda = device_type == "cuda"
    if chunk_bytes is None:
        chunk_bytes = CUDA_CHUNK_BYTES if on_cuda else CHUNK_BYTES
    most = max(chunk_bytes // row_bytes, 1)
    rows = math.ceil(max(num_rows, 1) / math.ceil(max(num_rows, 1) / most))
    if on_cuda and most >= _CUDA_ROW_MULTIPLE:
        rows = math.ceil(rows / _CUDA_ROW_MULTIPLE) * _CUDA_ROW_MULTIPLE
        rows = min(rows, most // _CUDA_ROW_MULTIPLE * _CUDA_ROW_MULTIPLE)
    return rows
