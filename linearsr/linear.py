"""A linear layer that takes the faster of the two matrix libraries inside torch.

On a CPU torch sends float32 products to its BLAS, MKL in the released builds, which on other makers' processors runs at half of their
speed: 107 against 220 GFLOP/s of oneDNN on one core of an AMD EPYC with AVX-512. oneDNN is in the same torch, and just as exact.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

MIN_PRODUCTS = 1 << 22
"""Multiplications from which on oneDNN's call costs less than it saves; measured, see tests/benchmarks/README.md."""


class Linear(nn.Linear):
    """`nn.Linear` with the same weights and output, and another library under float32 on a CPU."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name in nn.Linear)
        """Project the last axis: (..., in_features) -> (..., out_features)."""
        rows = input.numel() // self.in_features
        if not (_takes(input, self.weight) and rows * self.weight.numel() >= MIN_PRODUCTS):
            return F.linear(input, self.weight, self.bias)
        flat = input.reshape(rows, self.in_features)
        return _OneDnnLinear.apply(flat, self.weight, self.bias).view(*input.shape[:-1], self.out_features)  # type: ignore[no-any-return]


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = _product(grad, weight.t()) if needs_x else None
        grad_weight = _product(grad.t(), x.t()) if needs_weight else None
        return grad_x, grad_weight, grad.sum(dim=0) if needs_bias else None


def _takes(x: Tensor, weight: Tensor) -> bool:
    """Say whether oneDNN is there for these, and not what torch would take anyway."""
    single = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    return single and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weight^T + bias for matrices, (R, I) and (O, I) -> (R, O)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]  # noqa: SLF001 (no public name)
