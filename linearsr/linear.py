"""A linear layer that takes the fastest of the matrix libraries inside torch.

On a CPU torch sends float32 products to its BLAS, MKL in the released builds, which does not use the AVX-512 of other makers' processors:
107 against 220 GFLOP/s of oneDNN on one core of an AMD EPYC that has it, 97 against 104 on another. oneDNN is in the same torch, and just
as exact. Without AVX-512 MKL is the faster, 85 against 65. Half precision then has no library at all: torch multiplies one number at a
time, 8 GFLOP/s.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

MIN_PRODUCTS = 1 << 22
"""Multiplications from which on oneDNN's call costs less than it saves; measured, see tests/benchmarks/README.md."""


class Linear(nn.Linear):
    """`nn.Linear` with the same weights, and on a CPU another library under its products."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name in nn.Linear)
        """Project the last axis: (..., in_features) -> (..., out_features)."""
        return linear(input, self.weight, self.bias)


class LendingLinear(Linear):
    """A linear layer whose weights are also used from outside, during a call: DeepSpeed's ZeRO 3 gathers them for a call alone."""

    def forward(self, input: Tensor, use: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None) -> Tensor:  # noqa: A002
        """Project the last axis of `input`; or return what `use` makes of it, the weight and the bias.

        That is one tensor either way: ZeRO 3 notes a call for each tensor, and workers may not differ in them.
        """
        return super().forward(input) if use is None else use(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Project the last axis as `F.linear` does: x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    if torch.compiler.is_compiling() or not _takes(x, weight):
        return F.linear(x, weight, bias)
    return _CpuLinear.apply(x.reshape(-1, weight.shape[1]), weight, bias).view(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]


def linear_each(x_BNI: Tensor, weight_BOI: Tensor, bias_BO: Tensor) -> Tensor:
    """Project every sample by a weight and a bias of its own: (B, N, I) -> (B, N, O)."""
    if torch.compiler.is_compiling() or not _takes(x_BNI[0], weight_BOI[0]):
        return torch.baddbmm(bias_BO[:, None], x_BNI, weight_BOI.transpose(1, 2))
    return torch.stack([linear(x, weight, bias) for x, weight, bias in zip(x_BNI, weight_BOI, bias_BO, strict=True)])


class _CpuLinear(torch.autograd.Function):
    """Computes in `product_dtype`, and keeps what autograd would keep for `F.linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        wide = product_dtype(x)
        return _product(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        wide = grad.to(product_dtype(grad))
        grad_x = _product(wide, weight.t().to(wide.dtype)).to(x.dtype) if needs_x else None
        grad_weight = _sum_of_products(wide, x.to(wide.dtype)).to(weight.dtype) if needs_weight else None
        return grad_x, grad_weight, wide.sum(dim=0).to(grad.dtype) if needs_bias else None


def product_dtype(x: Tensor) -> torch.dtype:
    """Return what to multiply values like `x` in: float32 for halves on a CPU without instructions for them, else their own dtype.

    A compiler is left to its own choice.
    """
    if torch.compiler.is_compiling():
        return x.dtype
    slow = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and not _has_instructions(x.dtype)
    return torch.float32 if slow else x.dtype


@cache
def _has_instructions(half: torch.dtype) -> bool:
    """Say whether oneDNN multiplies this half precision on this processor."""
    name = "_is_mkldnn_bf16_supported" if half == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return bool(getattr(torch.ops.mkldnn, name)()) if hasattr(torch.ops.mkldnn, name) else False


def _takes(x: Tensor, weight: Tensor) -> bool:
    """Say whether these are multiplied here: where torch would take a slower library."""
    if not (x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype) or torch.is_autocast_enabled("cpu"):
        return False
    return _for_onednn(x.numel() // weight.shape[1], weight) if x.dtype == torch.float32 else product_dtype(x) != x.dtype


def _for_onednn(rows: int, weight: Tensor) -> bool:
    return rows * weight.numel() >= MIN_PRODUCTS and _has_avx512()


@cache
def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weight^T + bias for float32 matrices, (R, I) and (O, I) -> (R, O)."""
    if x.dtype != torch.float32 or not _for_onednn(x.shape[0], weight):
        return F.linear(x, weight, bias)
    # It takes matrices in any strides, but reads a bias as if it were in one piece, and says nothing.
    dense = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, dense, "none", [], "")  # type: ignore[no-any-return]  # noqa: SLF001 (no public name)


def _sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Return left^T right: (R, O) and (R, I) -> (O, I)."""
    # oneDNN takes its second factor as it lies and copies its first. The narrower is copied where that spares more than it costs to add
    # the result, which comes the other way round, to a gradient.
    rows, (wide, narrow) = len(left), (left.shape[1], right.shape[1])
    if left.dtype == torch.float32 and _has_avx512() and rows * (wide - narrow) > 4 * wide * narrow:
        return _product(right.t(), left.t()).t()
    return _product(left.t(), right.t())


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what `linear` does, without a gradient and in the dtype of all three: x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    return _product(x.view(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))


def product_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Write x weight^T + bias to `out`, which may have another dtype: x (..., I), weight (O, I), bias (O,) -> (..., O); no gradient.

    All must be in one piece of memory.
    """
    rows, into = x.view(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    if out.dtype != x.dtype or (x.dtype == torch.float32 and _for_onednn(len(rows), weight)):
        into.copy_(_product(rows, weight, bias))
    elif bias is None:
        torch.mm(rows, weight.t(), out=into)
    else:
        torch.addmm(bias, rows, weight.t(), out=into)


def products_into(out_BNO: Tensor, x_BNI: Tensor, weight_BOI: Tensor, bias: Tensor) -> None:
    """Do `product_into` for every sample with a weight of its own."""
    for out, x, weight in zip(out_BNO, x_BNI, weight_BOI, strict=True):
        product_into(out, x, weight, bias)


def add_products(total_BOI: Tensor, left_BNO: Tensor, right_BNI: Tensor) -> None:
    """Add left^T right to `total`, sample by sample; no gradient."""
    for total, left, right in zip(total_BOI, left_BNO, right_BNI, strict=True):
        if left.dtype == torch.float32 and _for_onednn(left.shape[1], right.t()):
            total.add_(_product(left.t(), right.t()))
        else:
            total.addmm_(left.t(), right)
