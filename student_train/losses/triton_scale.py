"""Multiplication by a number that only the GPU knows, at no cost where it is 1."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_NUM_PROGRAMS = 1024  # enough to keep the memory of any GPU busy


def multiply_(values: Tensor, factor: Tensor) -> None:
    """Multiply a contiguous tensor in place by a [] tensor; a factor of 1 reads nothing else."""
    num_blocks = triton.cdiv(values.numel(), _BLOCK)
    if num_blocks:
        _multiply[(min(num_blocks, _NUM_PROGRAMS),)](
            values, factor, values.numel(), num_programs=min(num_blocks, _NUM_PROGRAMS),
            block=_BLOCK,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no types
def _multiply(
    values: tl.tensor,
    factors: tl.tensor,
    num_values: tl.tensor,
    num_programs: tl.constexpr,
    block: tl.constexpr,
) -> None:
    factor = tl.load(factors)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * block
        for start in range(first, num_values, num_programs * block):
            place = start + tl.arange(0, block)
            inside = place < num_values
            product = tl.load(values + place, mask=inside) * factor
            tl.store(values + place, product.to(values.dtype.element_ty), mask=inside)
