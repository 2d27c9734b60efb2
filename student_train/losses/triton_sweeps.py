"""The two sweeps over a row of logits, shared by the Triton kernels.

A program has a row. Columns from `num_vocab` to `width` are padding, which lets loads be wide
whatever the vocabulary: what it holds does not matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from student_train.losses.triton_math import tanh


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no types
def scaled(
    z: tl.tensor,
    bias: tl.tensor,
    columns: tl.tensor,
    mask: tl.tensor,
    logit_scale: tl.constexpr,
    softcap: tl.constexpr,
) -> tl.tensor:
    """Logits from the head's products: bias, scale and cap; -inf stays."""
    outputs = z
    if bias is not None:
        outputs += tl.load(bias + columns, mask=mask, other=0.0)
    if logit_scale != 1:
        outputs *= logit_scale
    if softcap is not None:
        outputs = softcap * tanh(outputs / softcap)
    return tl.where(z == float("-inf"), z, outputs)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def sum_tail(
    z_row: tl.tensor,
    bias: tl.tensor,
    num_vocab: tl.tensor,
    width: tl.tensor,
    temperature: tl.constexpr,
    logit_scale: tl.constexpr,
    softcap: tl.constexpr,
    block: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Peak of a row, and log-sum-exp of its logits minus the peak, at temperature 1 and another.

    Columns that hold -inf are left out; where all do, the peak is -inf and the sums are 0.
    """
    element = z_row.dtype.element_ty
    peak = tl.full((), float("-inf"), element)
    total = tl.full((), 0.0, element)
    total_tempered = tl.full((), 0.0, element)
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        z = tl.load(z_row + columns, mask=columns < width, other=float("-inf"))
        z = tl.where(columns < num_vocab, z, float("-inf"))
        z = scaled(z, bias, columns, columns < num_vocab, logit_scale, softcap)
        new_peak = tl.maximum(peak, tl.max(z, axis=0))
        # All -inf so far: any finite reference keeps the sums 0, -inf would make them NaN.
        reference = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp(peak - reference) + tl.sum(tl.exp(z - reference), axis=0)
        if temperature != 1:
            total_tempered = total_tempered * tl.exp((peak - reference) / temperature)
            total_tempered += tl.sum(tl.exp((z - reference) / temperature), axis=0)
        peak = new_peak
    is_empty = peak == float("-inf")
    rest = tl.log(tl.where(is_empty, 1.0, total))
    rest_tempered = rest
    if temperature != 1:
        rest_tempered = tl.log(tl.where(is_empty, 1.0, total_tempered))
    return peak, rest, rest_tempered


@triton.jit  # type: ignore[untyped-decorator]  # as above
def write_tail_gradient(
    z_row: tl.tensor,
    out_row: tl.tensor,
    bias: tl.tensor,
    peak: tl.tensor,
    rest: tl.tensor,
    rest_tempered: tl.tensor,
    factor: tl.tensor,
    factor_ce: tl.tensor,
    num_vocab: tl.tensor,
    width: tl.tensor,
    temperature: tl.constexpr,
    logit_scale: tl.constexpr,
    softcap: tl.constexpr,
    is_capped: tl.constexpr,
    is_packed: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """A row's softmax times a factor, plus that at temperature 1, times the slope of the cap.

    `is_capped`: the row holds logits already, not the head's products. `is_packed`: `out_row` is
    a narrower row in the memory of `z_row`.
    """
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        z = tl.load(z_row + columns, mask=columns < width, other=float("-inf"))
        z = tl.where(columns < num_vocab, z, float("-inf"))
        if not is_capped:
            z = scaled(z, bias, columns, columns < num_vocab, logit_scale, softcap)
        if is_packed:
            # The narrower row overlaps this block and earlier ones: none may be written before
            # all warps have read it.
            tl.debug_barrier()
        g = tl.exp((z - peak) / temperature - rest_tempered) * factor
        if temperature != 1:
            g += tl.exp((z - peak) - rest) * factor_ce
        if softcap is not None:
            g *= 1 - (z / softcap) * (z / softcap)
        tl.store(out_row + columns, g.to(out_row.dtype.element_ty), mask=columns < width)
