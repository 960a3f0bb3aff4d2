"""The kernels as functions with a gradient; each does what the piece of plain torch does that it stands in for.

One backward pass is supported; there is no second derivative.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearsr.kernels.library import Kernels


def compiled_gated_depthwise(hidden_BNF2: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], kernels: Kernels) -> Tensor:
    """Do what `linearsr.depthwise.gated_depthwise` does: (B, N, 2 F) -> (B, N, F). Keeps its input alone."""
    return _GatedDepthwise.apply(hidden_BNF2, weight, bias, grid, kernels)  # type: ignore[no-any-return]


def compiled_relu_attention(qkv_BNC3: Tensor, eps: float, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """Do what `linearsr.fused.relu_attention` does, with heads of `HEAD_WIDTH`. Keeps input, output, normaliser and state."""
    return _ReluAttention.apply(qkv_BNC3, eps, kernels)  # type: ignore[no-any-return]


class _GatedDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BNF2: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], kernels: Kernels) -> Tensor:
        hidden_BNF2 = hidden_BNF2.contiguous()
        ctx.save_for_backward(hidden_BNF2, weight, bias)
        ctx.grid, ctx.kernels = grid, kernels
        return kernels.gated_depthwise(hidden_BNF2, _dense(weight), _dense(bias), grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNF: Tensor) -> tuple[Tensor | None, ...]:
        hidden_BNF2, weight, bias = ctx.saved_tensors
        grads = ctx.kernels.gated_depthwise_gradients(hidden_BNF2, grad_BNF.contiguous(), _dense(weight), _dense(bias), ctx.grid)
        return grads[0], grads[1].to(weight.dtype), grads[2].to(bias.dtype), None, None


class _ReluAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_BNC3: Tensor, eps: float, kernels: Kernels) -> tuple[Tensor, Tensor]:
        qkv_BNC3 = qkv_BNC3.contiguous()
        out_BNC, normaliser, state = kernels.relu_attention(qkv_BNC3, eps)
        ctx.save_for_backward(qkv_BNC3, out_BNC, normaliser, state)
        ctx.eps, ctx.kernels = eps, kernels
        ctx.mark_non_differentiable(normaliser)
        return out_BNC, normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNC: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.kernels.relu_attention_gradient(*ctx.saved_tensors, grad_BNC.contiguous(), ctx.eps), None, None


def _dense(parameter: Tensor) -> Tensor:
    return parameter.detach().float().contiguous()
