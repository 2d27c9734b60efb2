"""The two dense passes over a chunk as Triton kernels, a row to a program.

For a vocabulary that is split over processes, and more kept entries than `triton_fused` takes;
the work per row and kept entry stays in `rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from student_train.losses.rows import RowGradients, TailSums, cap_
from student_train.losses.triton_sweeps import sum_tail, write_tail_gradient
from student_train.objective import Objective

_BLOCK = 8192
_NUM_WARPS = 16


class TritonPasses:
    """`rows.Passes` on a GPU: logits stay in place until the gradient takes their place."""

    max_fused_kept = 1024  # more would not fit into a program's registers

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._sums: TailSums | None = None

    @staticmethod
    def row_bytes(
        objective: Objective, width: int, dtype: torch.dtype, gradient_dtype: torch.dtype
    ) -> int:
        """Bytes of buffers per row: the logits alone."""
        return width * dtype.itemsize

    def transform_(self, logits_CV: Tensor) -> None:
        """Scale and cap the head's outputs."""
        cap_(self._objective, logits_CV)

    def reduce_(self, logits_CV: Tensor) -> TailSums:
        """Sum over the columns that are not -inf."""
        num_rows, width = logits_CV.shape
        peak, rest, rest_tempered = logits_CV.new_empty(3, num_rows).unbind(0)
        _sum_tails[(num_rows,)](
            logits_CV,
            peak,
            rest,
            rest_tempered,
            logits_CV.stride(0),
            width,
            temperature=float(self._objective.temperature),
            block=_BLOCK,
            num_warps=_NUM_WARPS,
        )
        self._sums = TailSums(peak, rest, rest_tempered)
        return self._sums

    def gradient_(self, logits_CV: Tensor, gradients: RowGradients, dtype: torch.dtype) -> Tensor:
        """The gradient by the head's outputs, in the memory of the logits.

        Where `dtype` is narrower, a row's gradient takes the first part of the row's memory.
        """
        if self._sums is None:
            raise ValueError("gradient_ needs the sums of reduce_: call that first")
        num_rows, width = logits_CV.shape
        packed_CV = logits_CV.view(dtype)[:, :width]
        _weight_softmax[(num_rows,)](
            logits_CV,
            packed_CV,
            self._sums.peak,
            self._sums.rest,
            self._sums.rest_tempered,
            gradients.tail,
            gradients.tail_ce,
            logits_CV.stride(0),
            packed_CV.stride(0),
            width,
            temperature=float(self._objective.temperature),
            softcap=self._objective.softcap,
            block=_BLOCK,
            num_warps=_NUM_WARPS,
            num_stages=1,
        )
        return packed_CV.scatter_(1, gradients.columns, gradients.values.to(dtype))


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no types
def _sum_tails(
    logits: tl.tensor,
    peak_out: tl.tensor,
    rest_out: tl.tensor,
    rest_tempered_out: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    temperature: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Peak of a row, and log-sum-exp of its logits minus the peak, at temperature 1 and another."""
    row = tl.program_id(0).to(tl.int64)
    peak, rest, rest_tempered = sum_tail(
        logits + row * stride, None, width, width, temperature, 1.0, None, block
    )
    tl.store(peak_out + row, peak)
    tl.store(rest_out + row, rest)
    tl.store(rest_tempered_out + row, rest_tempered)


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no types
def _weight_softmax(
    logits: tl.tensor,
    out: tl.tensor,
    peaks: tl.tensor,
    rests: tl.tensor,
    rests_tempered: tl.tensor,
    factors: tl.tensor,
    factors_ce: tl.tensor,
    stride: tl.tensor,
    out_stride: tl.tensor,
    width: tl.tensor,
    temperature: tl.constexpr,
    softcap: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """A row's softmax times a factor, plus that at temperature 1, times the slope of the cap."""
    row = tl.program_id(0).to(tl.int64)
    write_tail_gradient(
        logits + row * stride, out + row * out_stride, None,
        tl.load(peaks + row), tl.load(rests + row), tl.load(rests_tempered + row),
        tl.load(factors + row), tl.load(factors_ce + row),
        width, width, temperature, 1.0, softcap,
        is_capped=True, is_packed=True, block=block,
    )  # fmt: skip
