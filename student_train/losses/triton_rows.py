"""The two dense passes over a chunk as Triton kernels: the only file that imports Triton.

Each kernel gives a row to a program and passes over it once, so a chunk is read twice and written
once between its matrix products. The work per row and kept entry stays in `rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from student_train.losses.rows import RowGradients, TailSums, cap_
from student_train.objective import Objective

_BLOCK = 8192
_NUM_WARPS = 16


class TritonPasses:
    """`rows.TorchPasses` on a GPU: logits stay in place until the gradient takes their place."""

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
            temperature=self._objective.temperature,
            block=min(_BLOCK, triton.next_power_of_2(width)),
            num_warps=_NUM_WARPS,
        )
        tempered = self._objective.temperature != 1
        self._sums = TailSums(peak, rest, rest_tempered if tempered else rest)
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
            temperature=self._objective.temperature,
            softcap=self._objective.softcap,
            block=min(_BLOCK, triton.next_power_of_2(width)),
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
    element = logits.dtype.element_ty
    peak = tl.full((), float("-inf"), element)
    total = tl.full((), 0.0, element)
    total_tempered = tl.full((), 0.0, element)
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        z = tl.load(logits + row * stride + columns, mask=columns < width, other=float("-inf"))
        new_peak = tl.maximum(peak, tl.max(z, axis=0))
        # All -inf so far: any finite reference keeps the sums 0, -inf would make them NaN.
        reference = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp(peak - reference) + tl.sum(tl.exp(z - reference), axis=0)
        if temperature != 1:
            total_tempered = total_tempered * tl.exp((peak - reference) / temperature)
            total_tempered += tl.sum(tl.exp((z - reference) / temperature), axis=0)
        peak = new_peak
    none = peak == float("-inf")
    tl.store(peak_out + row, peak)
    tl.store(rest_out + row, tl.log(tl.where(none, 1.0, total)))
    if temperature != 1:
        tl.store(rest_tempered_out + row, tl.log(tl.where(none, 1.0, total_tempered)))


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
    peak = tl.load(peaks + row)
    rest = tl.load(rests + row)
    rest_tempered = tl.load(rests_tempered + row)
    factor = tl.load(factors + row)
    factor_ce = tl.load(factors_ce + row)
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        z = tl.load(logits + row * stride + columns, mask=columns < width, other=float("-inf"))
        # A narrower `out` overlaps this block and earlier ones: none may be written before all
        # warps have read it.
        tl.debug_barrier()
        g = tl.exp((z - peak) / temperature - rest_tempered) * factor
        if temperature != 1:
            g += tl.exp((z - peak) - rest) * factor_ce
        if softcap is not None:
            g *= 1 - (z / softcap) * (z / softcap)
        out_pointers = out + row * out_stride + columns
        tl.store(out_pointers, g.to(out.dtype.element_ty), mask=columns < width)
