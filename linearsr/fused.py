"""Pieces of the block with gradients written by hand: equal results, fewer tensors kept for the backward pass.

Autograd keeps every intermediate that a derivative needs. These functions keep their inputs alone and compute the cheap,
pointwise parts again; the matrix products, which are most of the time, still run once each way. On a CPU they work on bands of tokens.
`linearsr.depthwise` is another of them. Under `torch.compile` each is its plain definition, which the compiler fuses, and decides by itself
what to keep.

Shape suffixes: B batch, N tokens = H x W of the latent grid, n tokens of a band, C width, H heads, D head width.
Each function supports one backward pass, in any float dtype and on any device; none has a second derivative.
Source: method.md 2.2, 2.3.
"""

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from linearsr.bands import bands

aten = torch.ops.aten


def modulated_norm(x_BNC: Tensor, shift_B1C: Tensor, scale_B1C: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Normalise tokens and modulate them, LN(x) (1 + scale) + shift: (B, N, C) -> (B, N, C). Keeps x alone."""
    if torch.compiler.is_compiling():
        return F.layer_norm(x_BNC, x_BNC.shape[-1:], eps=eps) * (1 + scale_B1C) + shift_B1C
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
    if torch.compiler.is_compiling():
        query, key, value = (_wide_heads(qkv_BNC3, head_width, part) for part in (QUERY, KEY, VALUE))
        summed = query @ _state(key, value)
        mixed, normaliser = summed[..., :head_width], summed[..., head_width:]
        return (mixed / (normaliser + eps)).transpose(1, 2).flatten(2).to(qkv_BNC3.dtype), normaliser.detach()
    return _ReluAttention.apply(qkv_BNC3, head_width, eps)  # type: ignore[no-any-return]


class _ModulatedNorm(torch.autograd.Function):
    """One sample's modulation is an affine norm, which torch does in one pass; a GPU takes several samples at once rather."""

    @staticmethod
    def forward(ctx: Any, x_BNC: Tensor, shift_B1C: Tensor, scale_B1C: Tensor, eps: float) -> Tensor:
        if _one_by_one(x_BNC):
            samples = zip(*(torch.split(part, 1) for part in (x_BNC, shift_B1C, 1 + scale_B1C)), strict=True)
            of_samples = [aten.native_layer_norm(x, x.shape[-1:], scale.flatten(), shift.flatten(), eps) for x, shift, scale in samples]
            out_BNC, mean, inverse_std = (_joined(parts, dim=0) for parts in zip(*of_samples, strict=True))
        else:
            normed_BNC, mean, inverse_std = aten.native_layer_norm(x_BNC, x_BNC.shape[-1:], None, None, eps)
            out_BNC = torch.addcmul(shift_B1C, normed_BNC, 1 + scale_B1C)
        ctx.save_for_backward(x_BNC, scale_B1C, mean, inverse_std)
        return out_BNC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNC: Tensor) -> tuple[Tensor | None, ...]:
        x_BNC, scale_B1C, mean, inverse_std = ctx.saved_tensors
        if _one_by_one(x_BNC):
            samples = zip(*(torch.split(part, 1) for part in (grad_BNC, x_BNC, 1 + scale_B1C, mean, inverse_std)), strict=True)
            of_samples = [_affine_norm_gradients(*sample) for sample in samples]
            grad_x, grad_scale, grad_shift = (_joined(parts, dim=0) for parts in zip(*of_samples, strict=True))
            return grad_x, grad_shift.view_as(scale_B1C), grad_scale.view_as(scale_B1C), None
        normed_BNC = ((x_BNC - mean) * inverse_std).to(grad_BNC.dtype)
        grad_scale = (grad_BNC * normed_BNC).sum(dim=1, keepdim=True)
        grad_normed = grad_BNC * (1 + scale_B1C)
        grad_x, _, _ = aten.native_layer_norm_backward(
            grad_normed, x_BNC, x_BNC.shape[-1:], mean, inverse_std, None, None, [True, False, False]
        )
        return grad_x, grad_BNC.sum(dim=1, keepdim=True), grad_scale, None


class _ReluAttention(torch.autograd.Function):
    """Both passes go over the bands twice: sums over all tokens must be there before any token meets them."""

    @staticmethod
    def forward(ctx: Any, qkv_BNC3: Tensor, head_width: int, eps: float) -> tuple[Tensor, Tensor]:
        cuts = _token_bands(qkv_BNC3)
        state = _total(_state(*(_wide_heads(qkv_BNC3[:, band], head_width, part) for part in (KEY, VALUE))) for band in cuts)
        out_BNC = qkv_BNC3.new_empty((*qkv_BNC3.shape[:2], qkv_BNC3.shape[2] // 3))
        normalisers = []
        for band in cuts:
            summed = _wide_heads(qkv_BNC3[:, band], head_width, QUERY) @ state  # (B, H, n, D + 1)
            normalisers.append(summed[..., head_width:])
            torch.div(summed[..., :head_width], normalisers[-1] + eps, out=_heads(out_BNC[:, band], head_width))
        normaliser = _joined(normalisers, dim=2)
        ctx.save_for_backward(qkv_BNC3, out_BNC, state)
        ctx.head_width, ctx.eps = head_width, eps
        ctx.mark_non_differentiable(normaliser)
        return out_BNC, normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNC: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        qkv_BNC3, out_BNC, state = ctx.saved_tensors
        width, cuts = ctx.head_width, _token_bands(qkv_BNC3)
        grad_qkv = torch.empty_like(qkv_BNC3)
        into = [_heads(part, width) for part in grad_qkv.chunk(3, dim=-1)]

        def grad_state_of(band: slice) -> Tensor:
            query = _wide_heads(qkv_BNC3[:, band], width, QUERY)
            grad, mixed = (_heads(part[:, band], width).to(query.dtype) for part in (grad_BNC, out_BNC))
            normaliser = query @ state[..., width:] + ctx.eps
            # The gradient of the numerator and of the normaliser side by side, as the state holds both.
            grad_summed = torch.empty((*grad.shape[:-1], width + 1), dtype=query.dtype, device=query.device)
            torch.div(grad, normaliser, out=grad_summed[..., :width])
            torch.sum(grad_summed[..., :width] * mixed, dim=-1, keepdim=True, out=grad_summed[..., width:]).neg_()
            _put_active(into[QUERY][:, :, band], grad_summed @ state.transpose(-1, -2), query)
            return query.transpose(-1, -2) @ grad_summed  # (B, H, D, D + 1)

        grad_state = _total(grad_state_of(band) for band in cuts)
        for band in cuts:
            key, value = (_wide_heads(qkv_BNC3[:, band], width, part) for part in (KEY, VALUE))
            grad_key = value @ grad_state[..., :width].transpose(-1, -2) + grad_state[..., width:].transpose(-1, -2)
            _put_active(into[KEY][:, :, band], grad_key, key)
            into[VALUE][:, :, band].copy_(key @ grad_state[..., :width])
        return grad_qkv, None, None


QUERY, KEY, VALUE = 0, 1, 2


def _one_by_one(x_BNC: Tensor) -> bool:
    return x_BNC.shape[0] == 1 or x_BNC.device.type == "cpu"


def _affine_norm_gradients(grad_1NC: Tensor, x_1NC: Tensor, weight_11C: Tensor, mean: Tensor, inverse_std: Tensor) -> list[Tensor]:
    """Return the gradients of the input (1, N, C), the weight (1, C) and the bias (1, C)."""
    weight = weight_11C.flatten()
    grads = aten.native_layer_norm_backward(grad_1NC, x_1NC, weight.shape, mean, inverse_std, weight, weight, [True, True, True])
    return [grads[0], grads[1][None], grads[2][None]]


def _token_bands(x_BNC: Tensor) -> list[slice]:
    return bands(x_BNC.shape[1], x_BNC.shape[0] * x_BNC.shape[2], x_BNC)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def _total(parts: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, parts)


def _wide_heads(qkv_BnC3: Tensor, head_width: int, part: int) -> Tensor:
    """Return ReLU queries, ReLU keys or values, (B, H, n, D), in float32 or wider."""
    one_BnC = qkv_BnC3.chunk(3, dim=-1)[part]
    wide = one_BnC.to(torch.promote_types(one_BnC.dtype, torch.float32))
    return _heads(wide if part == VALUE else F.relu(wide), head_width)


def _heads(x_BnC: Tensor, head_width: int) -> Tensor:
    """View (B, n, C) as (B, H, n, D)."""
    return x_BnC.view(*x_BnC.shape[:-1], -1, head_width).transpose(1, 2)


def _state(key: Tensor, value: Tensor) -> Tensor:
    """Return what queries meet, (B, H, D, D + 1): keys times values, and the sum of keys as the last column."""
    return torch.cat([key.transpose(-1, -2) @ value, key.sum(dim=-2, keepdim=True).transpose(-1, -2)], dim=-1)


def _put_active(place: Tensor, grad_active: Tensor, active: Tensor) -> None:
    """Write the gradient before a ReLU where it belongs; the derivative is read off the ReLU's output."""
    same = place.dtype == grad_active.dtype
    aten.threshold_backward.grad_input(grad_active, active, 0, grad_input=place if same else grad_active)
    if not same:
        place.copy_(grad_active)
