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
        if x_BNC.shape[0] == 1:
            # One sample's modulation is an affine norm, whose gradients torch takes in one pass.
            weight = 1 + scale_B1C.flatten()
            grads = aten.native_layer_norm_backward(grad_BNC, x_BNC, weight.shape, mean, inverse_std, weight, weight, [True, True, True])
            return grads[0], grads[2].view_as(scale_B1C), grads[1].view_as(scale_B1C), None
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
        # ReLU's derivative, read off its output and written where the gradient belongs.
        for active, grad_active, place in ((query, grad_query, into[0]), (key, grad_key, into[1])):
            aten.threshold_backward.grad_input(grad_active.to(place.dtype), active.to(place.dtype), 0, grad_input=place)
        into[2].copy_(key @ grad_state[..., :width])
        return grad_qkv, None, None


class _GatedDepthwise(torch.autograd.Function):
    """Works on a few channels of value and gate at a time, so that what is in between stays in the processor's cache."""

    @staticmethod
    def forward(ctx: Any, hidden_BNF2: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(hidden_BNF2, weight, bias)
        ctx.grid = grid
        out_BNF = hidden_BNF2.new_empty((*hidden_BNF2.shape[:2], hidden_BNF2.shape[2] // 2))
        for channels in _channel_slices(hidden_BNF2):
            kernel, offset = (_paired(part, channels, dim=0) for part in (weight, bias))
            value, gate = _convolved(_active(hidden_BNF2, channels), kernel, offset, grid).chunk(2, dim=-1)
            torch.mul(value, F.silu(gate), out=out_BNF[..., channels])
        return out_BNF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNF: Tensor) -> tuple[Tensor | None, ...]:
        hidden_BNF2, weight, bias = ctx.saved_tensors
        grads = [torch.empty_like(part) for part in (hidden_BNF2, weight, bias)]
        for channels in _channel_slices(hidden_BNF2):
            active = _active(hidden_BNF2, channels)
            kernel, offset = (_paired(part, channels, dim=0) for part in (weight, bias))
            value, gate = _convolved(active, kernel, offset, ctx.grid).chunk(2, dim=-1)
            grad_convolved = torch.empty_like(active)
            into_value, into_gate = grad_convolved.chunk(2, dim=-1)
            grad_out = grad_BNF[..., channels]
            torch.mul(grad_out, F.silu(gate), out=into_value)
            aten.silu_backward.grad_input(grad_out * value, gate, grad_input=into_gate)
            groups = kernel.shape[0]
            grad_active, *grad_kernel = aten.convolution_backward(
                _planes(grad_convolved, ctx.grid), _planes(active, ctx.grid), kernel, [groups],
                [1, 1], [1, 1], [1, 1], False, [0, 0], groups, [True, True, True],
            )  # fmt: skip
            for grad, part in zip(grads[1:], grad_kernel, strict=True):
                _put_paired(grad, channels, part, dim=0)
            for place, part in zip(_pair(channels, hidden_BNF2.shape[-1]), _tokens(grad_active).chunk(2, dim=-1), strict=True):
                aten.silu_backward.grad_input(part, hidden_BNF2[..., place], grad_input=grads[0][..., place])
        return (*grads, None)


CACHED_VALUES = 1 << 18
"""Values of one intermediate that are worked on at a time on a CPU: 1 MiB of float32, a core's second-level cache."""


def _channel_slices(hidden_BNF2: Tensor) -> list[slice]:
    """Cut the F channels into slices that fit the cache; a GPU takes them all at once."""
    channels = hidden_BNF2.shape[-1] // 2
    step = channels
    if hidden_BNF2.device.type == "cpu":
        # 16 values are a cache line of float32.
        step = max(16, CACHED_VALUES // (2 * hidden_BNF2.shape[0] * hidden_BNF2.shape[1]) // 16 * 16)
    return [slice(start, min(start + step, channels)) for start in range(0, channels, step)]


def _pair(channels: slice, width: int) -> tuple[slice, slice]:
    """Return where the value's channels are among `width`, and where their gates are."""
    return channels, slice(channels.start + width // 2, channels.stop + width // 2)


def _paired(part: Tensor, channels: slice, dim: int) -> Tensor:
    """Return the channels of value and gate side by side."""
    return torch.cat([part.narrow(dim, one.start, one.stop - one.start) for one in _pair(channels, part.shape[dim])], dim=dim)


def _put_paired(whole: Tensor, channels: slice, part: Tensor, dim: int) -> None:
    """Write the channels of value and gate back to where `_paired` took them from."""
    for one, half in zip(_pair(channels, whole.shape[dim]), part.chunk(2, dim=dim), strict=True):
        whole.narrow(dim, one.start, one.stop - one.start).copy_(half)


def _active(hidden_BNF2: Tensor, channels: slice) -> Tensor:
    """Return SiLU of the channels of value and gate, (B, N, 2 K) contiguous."""
    active = hidden_BNF2.new_empty((*hidden_BNF2.shape[:2], 2 * (channels.stop - channels.start)))
    for place, into in zip(_pair(channels, hidden_BNF2.shape[-1]), active.chunk(2, dim=-1), strict=True):
        aten.silu.out(hidden_BNF2[..., place], out=into)
    return active


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
