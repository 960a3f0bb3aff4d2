"""Pieces of the block with gradients written by hand: equal results, fewer tensors kept for the backward pass.

Autograd keeps every intermediate that a derivative needs. These functions keep their inputs alone and compute the cheap,
pointwise and depthwise parts again; the matrix products, which are most of the time, still run once each way.

Shape suffixes: B batch, N tokens = H x W of the latent grid, C width, H heads, D head width, F hidden channels of Mix-FFN.
Each function supports one backward pass, in any float dtype and on any device; none has a second derivative.
Source: method.md 2.2, 2.3, 2.5.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

aten = torch.ops.aten


def modulated_norm(x_BNC: Tensor, shift_B1C: Tensor, scale_B1C: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Normalise tokens and modulate them, LN(x) (1 + scale) + shift: (B, N, C) -> (B, N, C). Keeps x alone."""
    return _ModulatedNorm.apply(x_BNC, shift_B1C, scale_B1C, eps)  # type: ignore[no-any-return]


def relu_attention(qkv_BNC3: Tensor, head_width: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mix values by ReLU linear attention in O(N); sums run in float32 or wider. Keeps the input and the output alone.

    Args:
        qkv_BNC3: (B, N, 3 C): queries, keys and values, each of C = heads x `head_width` channels.
        head_width: D.
        eps: Added to the normaliser, so a query without a positive key gives 0 and not NaN.

    Returns:
        The mixed values (B, N, C) in the input's dtype, and the normaliser (B, H, N, 1) of each query before `eps`, which
        carries no gradient.
    """
    return _ReluAttention.apply(qkv_BNC3, head_width, eps)  # type: ignore[no-any-return]


def gated_depthwise(hidden_BNF2: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
    """Apply SiLU, a depthwise 3x3 convolution on the grid and a SiLU gate: (B, N, 2 F) -> (B, N, F). Keeps its input alone.

    Args:
        hidden_BNF2: Tokens of the (H, W) grid in row-major order.
        weight, bias: Of the convolution, (2 F, 1, 3, 3) and (2 F,).
        grid: (H, W).
    """
    return _GatedDepthwise.apply(hidden_BNF2, weight, bias, grid)  # type: ignore[no-any-return]


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BNC: Tensor, shift_B1C: Tensor, scale_B1C: Tensor, eps: float) -> Tensor:
        normed_BNC, mean, inverse_std = aten.native_layer_norm(x_BNC, x_BNC.shape[-1:], None, None, eps)
        ctx.save_for_backward(x_BNC, scale_B1C, mean, inverse_std)
        return torch.addcmul(shift_B1C, normed_BNC, 1 + scale_B1C)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNC: Tensor) -> tuple[Tensor | None, ...]:
        x_BNC, scale_B1C, mean, inverse_std = ctx.saved_tensors
        normed_BNC = ((x_BNC - mean) * inverse_std).to(grad_BNC.dtype)
        grad_scale = (grad_BNC * normed_BNC).sum(dim=1, keepdim=True)
        grad_normed = grad_BNC * (1 + scale_B1C)
        grad_x, _, _ = aten.native_layer_norm_backward(
            grad_normed, x_BNC, x_BNC.shape[-1:], mean, inverse_std, None, None, [True, False, False]
        )
        return grad_x, grad_BNC.sum(dim=1, keepdim=True), grad_scale, None


class _ReluAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_BNC3: Tensor, head_width: int, eps: float) -> tuple[Tensor, Tensor]:
        query, key, value = _wide_heads(qkv_BNC3, head_width)
        state = _state(key, value)
        summed = query @ state  # (B, H, N, D + 1)
        normaliser = summed[..., head_width:]
        mixed_BNC = torch.empty((*qkv_BNC3.shape[:2], qkv_BNC3.shape[2] // 3), dtype=summed.dtype, device=summed.device)
        torch.div(summed[..., :head_width], normaliser + eps, out=_heads(mixed_BNC, head_width))
        out_BNC = mixed_BNC.to(qkv_BNC3.dtype)
        ctx.save_for_backward(qkv_BNC3, out_BNC)
        ctx.head_width, ctx.eps = head_width, eps
        ctx.mark_non_differentiable(normaliser)
        return out_BNC, normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNC: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        qkv_BNC3, out_BNC = ctx.saved_tensors
        width = ctx.head_width
        query, key, value = _wide_heads(qkv_BNC3, width)
        grad, mixed = (_heads(part, width).to(query.dtype) for part in (grad_BNC, out_BNC))
        state = _state(key, value)
        normaliser = query @ state[..., width:] + ctx.eps
        # The gradient of the numerator and of the normaliser side by side, as the state holds both.
        grad_summed = torch.empty((*grad.shape[:-1], width + 1), dtype=query.dtype, device=query.device)
        torch.div(grad, normaliser, out=grad_summed[..., :width])
        torch.sum(grad_summed[..., :width] * mixed, dim=-1, keepdim=True, out=grad_summed[..., width:]).neg_()
        grad_state = query.transpose(-1, -2) @ grad_summed  # (B, H, D, D + 1)
        grad_query = grad_summed @ state.transpose(-1, -2)
        grad_key = value @ grad_state[..., :width].transpose(-1, -2) + grad_state[..., width:].transpose(-1, -2)
        grad_qkv = torch.empty_like(qkv_BNC3)
        into = [_heads(part, width) for part in grad_qkv.chunk(3, dim=-1)]
        into[0].copy_(grad_query.mul_(query > 0))
        into[1].copy_(grad_key.mul_(key > 0))
        into[2].copy_(key @ grad_state[..., :width])
        return grad_qkv, None, None


class _GatedDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BNF2: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(hidden_BNF2, weight, bias)
        ctx.grid = grid
        value, gate = _convolved(F.silu(hidden_BNF2), weight, bias, grid).chunk(2, dim=-1)
        return F.silu(gate).mul_(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNF: Tensor) -> tuple[Tensor | None, ...]:
        hidden_BNF2, weight, bias = ctx.saved_tensors
        active_BNF2 = F.silu(hidden_BNF2)
        value, gate = _convolved(active_BNF2, weight, bias, ctx.grid).chunk(2, dim=-1)
        grad_convolved = torch.empty_like(hidden_BNF2)
        into_value, into_gate = grad_convolved.chunk(2, dim=-1)
        torch.mul(grad_BNF, F.silu(gate), out=into_value)
        aten.silu_backward.grad_input(grad_BNF * value, gate, grad_input=into_gate)
        channels = weight.shape[0]
        grad_active, grad_weight, grad_bias = aten.convolution_backward(
            _planes(grad_convolved, ctx.grid), _planes(active_BNF2, ctx.grid), weight, [channels],
            [1, 1], [1, 1], [1, 1], False, [0, 0], channels, [True, *ctx.needs_input_grad[1:3]],
        )  # fmt: skip
        return aten.silu_backward(_tokens(grad_active), hidden_BNF2), grad_weight, grad_bias, None


def _wide_heads(qkv_BNC3: Tensor, head_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ReLU queries, ReLU keys and values, (B, H, N, D) each, in float32 or wider."""
    wide = torch.promote_types(qkv_BNC3.dtype, torch.float32)
    query, key, value = (_heads(part, head_width) for part in qkv_BNC3.chunk(3, dim=-1))
    return F.relu(query).to(wide), F.relu(key).to(wide), value.to(wide)


def _heads(x_BNC: Tensor, head_width: int) -> Tensor:
    """View (B, N, C) as (B, H, N, D)."""
    return x_BNC.view(*x_BNC.shape[:-1], -1, head_width).transpose(1, 2)


def _state(key: Tensor, value: Tensor) -> Tensor:
    """Return what queries meet, (B, H, D, D + 1): keys times values, and the sum of keys as the last column."""
    return torch.cat([key.transpose(-1, -2) @ value, key.sum(dim=-2, keepdim=True).transpose(-1, -2)], dim=-1)


def _planes(x_BNF: Tensor, grid: tuple[int, int]) -> Tensor:
    """View tokens as (B, F, H, W); that is channels-last in memory, so nothing is copied."""
    return x_BNF.view(x_BNF.shape[0], *grid, -1).permute(0, 3, 1, 2)


def _tokens(x_BFHW: Tensor) -> Tensor:
    """View (B, F, H, W), channels-last in memory, as tokens (B, N, F)."""
    return x_BFHW.permute(0, 2, 3, 1).flatten(1, 2)


def _convolved(active_BNF2: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
    return _tokens(F.conv2d(_planes(active_BNF2, grid), weight, bias, padding=1, groups=weight.shape[0]))
