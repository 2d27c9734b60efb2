"""The loop over chunks of tokens, so that the logits of all tokens never exist at once.

A chunk's logits are formed, turned into its losses and, in place, into its gradients, which are
multiplied back into the gradients of the head's operands.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from student_train.losses.head import HeadProducts
from student_train.losses.rows import RowResults, Student, TorchPasses, evaluate_rows
from student_train.losses.targets import TeacherTargets
from student_train.objective import Objective

if TYPE_CHECKING:
    from student_train.losses.triton_rows import TritonPasses
    from student_train.losses.vocab_parallel import VocabShard

logger = logging.getLogger(__name__)

# Many rows at a time let the matrix products run at full speed: a GPU needs 1024 or more with a
# vocabulary of 152k. On a CPU more than 100 to 200 gain nothing.
CUDA_CHUNK_BYTES = 640 * 2**20
CHUNK_BYTES = 96 * 2**20
_CUDA_ROW_MULTIPLE = 128
_COLUMN_MULTIPLE = 16
_HALF_HEADROOM = 8  # float16 gradients are scaled to about 2**8, of at most 2**16

Wanted = tuple[bool, bool, bool]


@dataclass(frozen=True)
class Problem:
    """Arguments of a call, apart from the tensors that autograd must see."""

    objective: Objective
    targets: TeacherTargets
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
        results = _loop(problem, head, row_weight_N)
        if problem.shard is not None and head.grad_hidden is not None:
            head.grad_hidden = problem.shard.sum_gradients(head.grad_hidden, head.result_dtype)
        gradients = (head.grad_hidden, head.grad_weight, head.grad_bias)
        if exponent is not None:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(torch.ldexp(gradient.new_ones(()), -exponent))
    return results, Gradients(*gradients)


def _loop(problem: Problem, head: HeadProducts, row_weight_N: Tensor | None) -> RowResults:
    """Yield every chunk's results in turn; its gradients go into the head."""
    num_rows, device, dtype = len(problem.targets), problem.targets.k.device, head.result_dtype
    width = buffer_width(head.num_vocab)
    passes_cls = passes_type(device.type)
    # Processes that share a vocabulary must cut at the same rows, whatever the size of their part.
    shard = problem.shard
    planned_width = width if shard is None else buffer_width(shard.even_share)
    row_bytes = passes_cls.row_bytes(problem.objective, planned_width, dtype, head.operand_dtype)
    chunk_rows = rows_per_chunk(num_rows, row_bytes, problem.chunk_bytes, device.type)
    buffer = torch.empty(min(chunk_rows, num_rows), width, device=device, dtype=dtype)
    results = RowResults(
        kl=torch.empty(num_rows, device=device, dtype=dtype),
        ce=torch.empty(num_rows, device=device, dtype=dtype),
        student_mass=torch.empty(num_rows, device=device, dtype=dtype),
        top1=torch.empty(num_rows, device=device, dtype=torch.bool),
    )
    for start in range(0, num_rows, chunk_rows):
        stop = min(start + chunk_rows, num_rows)
        logits_CV = buffer[: stop - start]
        head.logits_(start, stop, logits_CV[:, : head.num_vocab])
        part, grad_CV = _chunk(
            problem,
            passes_cls(problem.objective),
            problem.targets.select(slice(start, stop)),
            logits_CV,
            head,
            None if row_weight_N is None else row_weight_N[start:stop],
        )
        for name in ("kl", "ce", "student_mass", "top1"):
            getattr(results, name)[start:stop] = getattr(part, name)
        if grad_CV is not None:
            head.accumulate_(start, stop, grad_CV[:, : head.num_vocab])
    return results


def _chunk(
    problem: Problem,
    passes: TorchPasses | TritonPasses,
    targets: TeacherTargets,
    logits_CV: Tensor,
    head: HeadProducts,
    row_weight: Tensor | None,
) -> tuple[RowResults, Tensor | None]:
    """One chunk's results and, in the memory of its logits, its gradient."""
    objective, shard, num_local = problem.objective, problem.shard, head.num_vocab
    num_vocab = num_local if shard is None else shard.num_vocab
    passes.transform_(logits_CV[:, :num_local])
    logits_CV[:, num_local:] = -torch.inf
    kept_ids = targets.top_ids.masked_fill(~targets.kept(), num_vocab).long()
    label_ids = targets.target_ids.long()[:, None]
    if shard is not None:
        kept_ids = shard.local_columns(kept_ids, num_local)
        label_ids = shard.local_columns(label_ids, num_local)
    kept, label = logits_CV.gather(1, kept_ids), logits_CV.gather(1, label_ids)[:, 0]
    logits_CV.scatter_(1, kept_ids, -torch.inf)
    student = local = Student(kept, label, passes.reduce_(logits_CV))
    if shard is not None:
        student = shard.merge(local, objective.temperature)
    results, gradients = evaluate_rows(objective, targets, student, num_vocab, row_weight)
    if gradients is None:
        return results, None
    if shard is not None:
        shares = shard.tail_shares(local.tail, student.tail, objective.temperature)
        gradients = replace(
            gradients,
            tail=gradients.tail * shares[1],
            tail_ce=gradients.tail_ce * shares[0],
            columns=shard.local_columns(gradients.columns, num_local),
        )
    return results, passes.gradient_(logits_CV, gradients, head.operand_dtype)


def buffer_width(num_vocab: int) -> int:
    """Width of V and at least one more: a dummy column for padding and the like."""
    return (num_vocab // _COLUMN_MULTIPLE + 1) * _COLUMN_MULTIPLE


@functools.cache
def passes_type(device_type: str) -> type[TorchPasses] | type[TritonPasses]:
    """Triton's kernels on CUDA where Triton is installed, PyTorch's everywhere else."""
    if device_type != "cuda":
        return TorchPasses
    try:
        from student_train.losses.triton_rows import TritonPasses
    except ImportError as error:
        logger.warning("the loss runs without its Triton kernels, at about half speed: %s", error)
        return TorchPasses
    return TritonPasses


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
