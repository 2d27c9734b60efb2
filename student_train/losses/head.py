"""The three matrix products of a linear head, accumulated at float32 or better."""

from __future__ import annotations

import torch
from torch import Tensor


class HeadProducts:
    """The head of one call: operands in the dtype of computation, gradients as they grow.

    Products of bfloat16 or float16 operands come out as float32. On CUDA the matrix product does
    that; elsewhere the operands are widened first, which costs a float32 copy of the weight.

    Attributes:
        result_dtype: float64 for float64 operands, else float32.
        bias_V: [V] or None, in result_dtype; whoever takes the products adds it.
        grad_hidden: [N, D] or None.
        grad_weight: [V, D] or None, in result_dtype.
        grad_bias: [V] or None, in result_dtype.
    """

    def __init__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        dtype: torch.dtype,
        wanted: tuple[bool, bool, bool],
    ) -> None:
        """Round the operands to `dtype`, as `linear` would under autocast.

        `wanted` says which gradients to form: of hidden, weight, bias.
        """
        device = hidden_ND.device
        self.result_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        operand_dtype = dtype if device.type == "cuda" else self.result_dtype
        self._hidden_ND = hidden_ND.to(dtype).to(operand_dtype)
        self._weight_VD = weight_VD.to(dtype).to(operand_dtype)
        self.bias_V = None if bias_V is None else bias_V.to(dtype).to(self.result_dtype)
        self.grad_hidden: Tensor | None = None
        self.grad_weight: Tensor | None = None
        self.grad_bias: Tensor | None = None
        if wanted[0]:
            # float16 would lose what the loss scale, applied in the backward, is there to save.
            half = operand_dtype == torch.float16
            grad_dtype = self.result_dtype if half else operand_dtype
            self.grad_hidden = torch.empty(hidden_ND.shape, device=device, dtype=grad_dtype)
        if wanted[1]:
            # The first chunk overwrites it: zeros would cost one more pass.
            new = torch.empty if len(hidden_ND) else torch.zeros
            self.grad_weight = new(weight_VD.shape, device=device, dtype=self.result_dtype)
        if wanted[2]:
            self.grad_bias = torch.zeros(len(weight_VD), device=device, dtype=self.result_dtype)

    @property
    def num_vocab(self) -> int:
        """V."""
        return len(self._weight_VD)

    @property
    def operand_dtype(self) -> torch.dtype:
        """Dtype of the operands of the products."""
        return self._weight_VD.dtype

    def products_(self, start: int, stop: int, out_CV: Tensor) -> None:
        """Write the outputs of rows [start, stop), short of the bias, into `out_CV`."""
        _product(self._hidden_ND[start:stop], self._weight_VD.t(), out_CV)

    def accumulate_(self, start: int, stop: int, grad_CV: Tensor) -> None:
        """Add the operands' gradients from the gradient of the outputs of rows [start, stop).

        Its dtype is `operand_dtype`.
        """
        if self.grad_bias is not None:
            self.grad_bias.add_(grad_CV.sum(dim=0, dtype=self.result_dtype))
        if self.grad_hidden is not None:
            _product(grad_CV, self._weight_VD, self.grad_hidden[start:stop])
        if self.grad_weight is not None:
            rows = self._hidden_ND[start:stop]
            beta = 0 if start == 0 else 1  # with 0, addmm ignores what the memory holds
            total = self.grad_weight
            if total.dtype == rows.dtype:
                total.addmm_(grad_CV.t(), rows, beta=beta)
            else:
                torch.addmm(total, grad_CV.t(), rows, total.dtype, beta=beta, out=total)


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """`left` @ `right` into `out`, accumulated and written in the dtype of `out`."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out.dtype, out=out)
