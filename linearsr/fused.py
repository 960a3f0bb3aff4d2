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
from linearsr.kernels import HEAD_WIDTH, Kernels, compiled_relu_attention

aten = torch.ops.aten


def modulated_norm(x_BNC: Tensor, shift_B1C: Tensor, scale_B1C: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Normalise tokens and modulate them, LN(x) (1 + scale) + shift: (B, N, C) -> (B, N, C). Keeps x alone."""
    if torch.compiler.is_compiling():
        return F.layer_norm(x_BNC, x_BNC.shape[-1:], eps=eps) * (1 + scale_B1C) + shift_B1C
    return _ModulatedNorm.apply(x_BNC, shift_B1C, scale_B1C, eps)  # type: ignore[no-any-return]


def relu_attention(qkv_BNC3: Tensor, head_width: int, eps: float, kernels: Kernels | None = None) -> tuple[Tensor, Tensor]:
    """Mix values by ReLU linear attention in O(N); sums run in float32 or wider. Keeps the input and the output alone.

    Args:
        qkv_BNC3: (B, N, 3 C): queries, keys and values, each of C = heads x `head_width` channels.
        head_width: D.
        eps: Added to the normaliser, so a query without a positive key gives 0 and not NaN.
        kernels: Compute it, if they take such values and heads; plain torch does without them.

    Returns:
        The mixed values (B, N, C) in the input's dtype, and the normaliser (B, H, N, 1) of each query before `eps`, which
        carries no gradient.
    """
    if kernels is not None and kernels.takes(qkv_BNC3) and head_width == HEAD_WIDTH:
        return compiled_relu_attention(qkv_BNC3, eps, kernels)
    if torch.compiler.is_compiling():
        parts, band = _Parts(qkv_BNC3, head_width), slice(None)
        summed = parts.active(QUERY, band) @ _state(parts.active(KEY, band), parts.wide(VALUE, band))
        mixed, normaliser = summed[..., :head_width], summed[..., head_width:]
        return (mixed / (normaliser + eps)).transpose(1, 2).flatten(2).to(qkv_BNC3.dtype), normaliser.detach()
    return _ReluAttention.apply(qkv_BNC3, head_width, eps)  # type: ignore[no-any-return]


class _ModulatedNorm(torch.autograd.Function):
    """One sample's modulation is an affine norm, which torch does in one pass; a GPU takes several samples at once rather."""

    @staticmethod
    def forward(ctx: Any, x_BNC: Tensor, shift_B1C: Tensor, scale_B1C: Tensor, eps: float) -> Tensor:
        if _one_by_one(x_BNC):
            wide = _sum_dtype(x_BNC)
            samples = _samples(x_BNC, shift_B1C.to(wide), 1 + scale_B1C.to(wide))
            of_samples = [aten.native_layer_norm(x, x.shape[-1:], scale.view(-1), shift.view(-1), eps) for x, shift, scale in samples]
            out_BNC, mean, inverse_std = _joined_samples(of_samples)
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
            samples = _samples(grad_BNC, x_BNC, 1 + scale_B1C.to(_sum_dtype(x_BNC)), mean, inverse_std)
            grad_x, *grads = _joined_samples([_affine_norm_gradients(*sample) for sample in samples])
            grad_scale, grad_shift = (grad.view_as(scale_B1C).to(scale_B1C.dtype) for grad in grads)
            return grad_x, grad_shift, grad_scale, None
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
        parts, cuts = _Parts(qkv_BNC3, head_width), _token_bands(qkv_BNC3)
        state = _total(_state(parts.active(KEY, band), parts.wide(VALUE, band)) for band in cuts)
        out_BNC = qkv_BNC3.new_empty((*qkv_BNC3.shape[:2], qkv_BNC3.shape[2] // 3))
        out_BHND = _heads(out_BNC, head_width)
        normaliser = qkv_BNC3.new_empty((*out_BHND.shape[:3], 1), dtype=parts.dtype)
        for band in cuts:
            summed = parts.active(QUERY, band) @ state  # (B, H, n, D + 1)
            # A copy: a view of it would keep a band's sums until the last.
            below = normaliser[:, :, band].copy_(summed[..., head_width:])
            torch.div(summed[..., :head_width], below + eps, out=out_BHND[:, :, band])
        ctx.save_for_backward(qkv_BNC3, out_BNC, state, normaliser)
        ctx.head_width, ctx.eps = head_width, eps
        ctx.mark_non_differentiable(normaliser)
        return out_BNC, normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNC: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        qkv_BNC3, out_BNC, state, normaliser = ctx.saved_tensors
        width, cuts = ctx.head_width, _token_bands(qkv_BNC3)
        parts, grad_qkv = _Parts(qkv_BNC3, width), torch.empty_like(qkv_BNC3)
        into, grad_BHND, mixed_BHND = _Parts(grad_qkv, width), _heads(grad_BNC, width), _heads(out_BNC, width)

        def grad_state_of(band: slice) -> Tensor:
            query = parts.active(QUERY, band)
            grad, mixed = (part[:, :, band].to(query.dtype) for part in (grad_BHND, mixed_BHND))
            # The gradient of the numerator and of the normaliser side by side, as the state holds both.
            grad_summed = torch.empty((*grad.shape[:-1], width + 1), dtype=query.dtype, device=query.device)
            grad_numerator = torch.div(grad, normaliser[:, :, band] + ctx.eps, out=grad_summed[..., :width])
            torch.sum(grad_numerator * mixed, dim=-1, keepdim=True, out=grad_summed[..., width:]).neg_()
            _put_active(into.heads[QUERY][:, :, band], grad_summed @ state.transpose(-1, -2), query)
            return query.transpose(-1, -2) @ grad_summed  # (B, H, D, D + 1)

        grad_state = _total(grad_state_of(band) for band in cuts)
        to_value = grad_state[..., :width]
        for band in cuts:
            key = parts.active(KEY, band)
            grad_key = parts.wide(VALUE, band) @ to_value.transpose(-1, -2) + grad_state[..., width:].transpose(-1, -2)
            _put_active(into.heads[KEY][:, :, band], grad_key, key)
            into.heads[VALUE][:, :, band].copy_(key @ to_value)
        return grad_qkv, None, None


QUERY, KEY, VALUE = 0, 1, 2


def _one_by_one(x_BNC: Tensor) -> bool:
    return x_BNC.shape[0] == 1 or x_BNC.device.type == "cpu"


def _affine_norm_gradients(grad_1NC: Tensor, x_1NC: Tensor, weight_11C: Tensor, mean: Tensor, inverse_std: Tensor) -> list[Tensor]:
    """Return the gradients of the input (1, N, C), the weight (1, C) and the bias (1, C)."""
    weight = weight_11C.flatten()
    grad, x = (part.to(weight.dtype) for part in (grad_1NC, x_1NC))
    grads = aten.native_layer_norm_backward(grad, x, weight.shape, mean, inverse_std, weight, weight, [True, True, True])
    return [grads[0].to(x_1NC.dtype), grads[1][None], grads[2][None]]


def _sum_dtype(x_BNC: Tensor) -> torch.dtype:
    """Return what statistics and sums over tokens are kept in: a CPU keeps halves as halves, whose sums stop at 256 times their terms."""
    return torch.promote_types(x_BNC.dtype, torch.float32) if x_BNC.device.type == "cpu" else x_BNC.dtype


def _samples(*batches: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Yield what belongs to each sample, with its batch axis."""
    return [batches] if batches[0].shape[0] == 1 else zip(*(torch.split(batch, 1) for batch in batches), strict=True)


def _joined_samples(of_samples: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
    return of_samples[0] if len(of_samples) == 1 else [torch.cat(parts) for parts in zip(*of_samples, strict=True)]


def _token_bands(x_BNC: Tensor) -> list[slice]:
    return bands(x_BNC.shape[1], x_BNC.shape[0] * x_BNC.shape[2], x_BNC)


def _total(parts: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, parts)


class _Parts:
    """Queries, keys and values of packed ones."""

    def __init__(self, qkv_BNC3: Tensor, head_width: int) -> None:
        self.heads = [_heads(part, head_width) for part in qkv_BNC3.chunk(3, dim=-1)]
        """(B, H, N, D) each."""
        self.dtype = torch.promote_types(qkv_BNC3.dtype, torch.float32)

    def wide(self, part: int, band: slice) -> Tensor:
        """Return some tokens, (B, H, n, D), in float32 or wider."""
        return self.heads[part][:, :, band].to(self.dtype)

    def active(self, part: int, band: slice) -> Tensor:
        """Return the ReLU of the same."""
        return F.relu(self.wide(part, band))


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
