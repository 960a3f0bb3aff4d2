"""ReLU linear attention in O(N), and cross-attention to caption tokens.

Shape suffixes: B batch, N image tokens, T caption tokens, C width, H heads, D head width.
Source: SANA (arXiv 2410.10629) section 3.2; method.md 2.2, 2.3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearsr.forward_only import folded_attention, folding_pays, works_forward_only
from linearsr.fused import relu_attention
from linearsr.kernels import UsesKernels
from linearsr.linear import LendingLinear, Linear, linear_each, product_dtype

EPS = 1e-15
"""Added to a query's normaliser. Source: diffusers' SANA; method.md 2.3."""

Probe = Callable[[Tensor, Tensor], None]
"""Is shown the input (B, N, C) of a linear attention and the normaliser (B, H, N, 1) of its queries."""


def relu_linear_attention(
    q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, *, eps: float = EPS, on_normaliser: Callable[[Tensor], None] | None = None
) -> Tensor:
    """Attend in O(N) by summing values against ReLU keys before meeting the queries.

    Args:
        q_BHND, k_BHND, v_BHND: (B, H, N, D), any float dtype; both products run in float32 or wider, because a
            half-precision sum over N keys overflows or stalls (method.md 2.4).
        eps: Added to the normaliser, so a query without a positive key gives 0 and not NaN.
        on_normaliser: Is shown the normaliser (B, H, N, 1) before `eps`.
    Returns:
        (B, H, N, D) in the dtype of `v_BHND`.
    Raises:
        ValueError: if the three shapes differ.
    Source: method.md 2.3.
    """
    if not q_BHND.shape == k_BHND.shape == v_BHND.shape:
        raise ValueError(f"relu_linear_attention: got {q_BHND.shape}, {k_BHND.shape}, {v_BHND.shape}; expected three equal shapes")
    head_width = v_BHND.shape[-1]
    packed_BNC3 = torch.cat([part.transpose(1, 2).flatten(2) for part in (q_BHND, k_BHND, v_BHND)], dim=-1)
    mixed_BNC, normaliser = relu_attention(packed_BNC3, head_width, eps)
    if on_normaliser is not None:
        on_normaliser(normaliser)
    return mixed_BNC.view(*mixed_BNC.shape[:-1], -1, head_width).transpose(1, 2).to(v_BHND.dtype)


class LinearAttention(nn.Module, UsesKernels):
    """Self-attention over image tokens with linear cost."""

    probe: Probe | None = None
    """Looks on at every pass while it is set."""

    def __init__(self, width: int, head_width: int, *, qk_norm: bool = False) -> None:
        """Make projections; `qkv` has no bias, `out` has one, as in SANA."""
        super().__init__()
        self.head_width = head_width
        self.qkv = LendingLinear(width, 3 * width, bias=False)
        self.out = LendingLinear(width, width)
        self.norm_q = nn.RMSNorm(width, eps=1e-5) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(width, eps=1e-5) if qk_norm else nn.Identity()
        self.qk_norm = qk_norm

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Mix tokens: (B, N, C) -> (B, N, C)."""
        if not self.qk_norm and works_forward_only(x_BNC) and folding_pays(x_BNC):
            # One inside the other, so that both are lent at once.
            return self.qkv(  # type: ignore[no-any-return]
                x_BNC, use=lambda x, qkv, _: self.out(x, use=lambda x, out, bias: self._folded(x, qkv, out, bias))
            )
        mixed_BNC, normaliser = relu_attention(self._packed(x_BNC), self.head_width, EPS, self.kernels)
        if self.probe is not None:
            self.probe(x_BNC, normaliser)
        return self.out(mixed_BNC)  # type: ignore[no-any-return]

    def _packed(self, x_BNC: Tensor) -> Tensor:
        """Return queries, keys and values side by side, (B, N, 3 C)."""
        qkv_BNC3: Tensor = self.qkv(x_BNC)
        if not self.qk_norm:
            return qkv_BNC3
        query, key, value = qkv_BNC3.chunk(3, dim=-1)
        return torch.cat([self.norm_q(query), self.norm_k(key), value], dim=-1)

    def _folded(self, x_BNC: Tensor, qkv: Tensor, out: Tensor, bias: Tensor) -> Tensor:
        result_BNC, normaliser = folded_attention(x_BNC, qkv, out, bias, self.head_width, EPS)
        if self.probe is not None:
            self.probe(x_BNC, normaliser)
        return result_BNC


@dataclass(frozen=True)
class KeyValue:
    """Captions as one cross-attention reads them; they do not depend on the noise level, so one will do for all steps."""

    key: Tensor
    """(B, H, T, D)."""
    value: Tensor
    """(B, H, T, D)."""
    mask: Tensor | None
    """(B, 1, 1, T) bool, True where a token is read; None where all are."""


@dataclass(frozen=True)
class AbsorbedCaption:
    """Short captions with the projections around them: image tokens -> scores -> softmax -> result, without queries and mixed values."""

    score_weight: Tensor
    """(B, H T, C): keys times the query projection, over sqrt(D)."""
    score_bias: Tensor
    """(B, H T), minus infinity for a token that is not read."""
    value_weight: Tensor
    """(B, C, H T): the output projection times values."""
    value_bias: Tensor
    """(B, C)."""
    num_tokens: int
    """T."""

    def read(self, x_BNC: Tensor) -> Tensor:
        """Return what image tokens read, (B, N, C) -> (B, N, C)."""
        wide_BNC = x_BNC.to(self.score_weight.dtype)
        scores = linear_each(wide_BNC, self.score_weight, self.score_bias)
        shares_BNHT = scores.view(*x_BNC.shape[:2], -1, self.num_tokens).softmax(dim=-1)
        return linear_each(shares_BNHT.flatten(2), self.value_weight, self.value_bias).to(x_BNC.dtype)


def absorption_pays(num_tokens: int, caption_tokens: int, width: int, num_heads: int) -> bool:
    """Say whether absorbing a caption takes fewer products than it spares in one forward of `num_tokens` image tokens a sample.

    Before, 2 C (C + T) an image token; after, 2 H T C, and 2 T C C once.
    """
    return caption_tokens * width + num_tokens * num_heads * caption_tokens < num_tokens * (width + caption_tokens)


class CrossAttention(nn.Module):
    """Softmax attention from image tokens to the few caption tokens.

    A score is x W_q k. With few caption tokens it is cheaper to multiply W_q and k first, and likewise values and the output projection.
    DeepSeek-V2 (arXiv 2405.04434, section 2.1.2) calls it absorption.
    """

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool = False) -> None:
        """Make projections, all with bias, as in SANA."""
        super().__init__()
        self.num_heads = num_heads
        self.query = LendingLinear(width, width)
        self.key_value = Linear(width, 2 * width)
        self.out = LendingLinear(width, width)
        self.norm_q = nn.RMSNorm(width, eps=1e-5) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(width, eps=1e-5) if qk_norm else nn.Identity()
        self.qk_norm = qk_norm

    def project(self, tokens_BTC: Tensor, mask_BT: Tensor | None) -> KeyValue:
        """Project captions (B, T, C); `mask_BT` is True where a token is real, None where all are.

        A sample without a real token reads zeros, not NaN.
        """
        key, value = self.key_value(tokens_BTC).chunk(2, dim=-1)
        key, value = self._split(self.norm_k(key)), self._split(value)
        if mask_BT is None:
            return KeyValue(key, value, None)
        empty_B = ~mask_BT.any(dim=1)
        value = value.masked_fill(empty_B[:, None, None, None], 0)
        return KeyValue(key, value, (mask_BT | empty_B[:, None])[:, None, None, :])

    def absorbs(self, caption: KeyValue, num_tokens: int) -> bool:
        """Say whether a caption is absorbed for forwards of `num_tokens` image tokens a sample: where that spares products.

        Not with QK-norm, which is not linear, and not in half precision, which would round the scores.
        """
        if self.qk_norm or product_dtype(caption.key) not in (torch.float32, torch.float64):
            return False
        _, heads, caption_tokens, head_width = caption.key.shape
        return absorption_pays(num_tokens, caption_tokens, heads * head_width, heads)

    def absorb(self, caption: KeyValue) -> AbsorbedCaption:
        """Multiply captions and the projections around them."""
        wide = product_dtype(caption.key)
        _, heads, num_tokens, head_width = caption.key.shape

        def to_scores(key: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            by_head = torch.cat([weight, bias[:, None]], dim=1).to(wide).view(heads, head_width, -1)  # (H, D, C + 1)
            return (key @ by_head).flatten(1, 2)  # (B, H T, C + 1)

        def to_result(value: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            by_head = weight.to(wide).view(-1, heads, head_width).permute(1, 2, 0)  # (H, D, C)
            return torch.cat([(value @ by_head).flatten(1, 2), bias.to(wide).expand(len(value), 1, -1)], dim=1)  # (B, H T + 1, C)

        # The norm, here the identity, is called for the order of calls; see `forward`.
        scores = self.norm_q(self.query(caption.key.to(wide) / head_width**0.5, use=to_scores))
        score_bias = scores[..., -1]
        if caption.mask is not None:
            hidden = ~caption.mask[:, 0].expand(-1, heads, -1).flatten(1)
            score_bias = score_bias.masked_fill(hidden, float("-inf"))
        result = self.out(caption.value.to(wide), use=to_result)
        return AbsorbedCaption(scores[..., :-1].contiguous(), score_bias, result[:, :-1].transpose(1, 2), result[:, -1], num_tokens)

    def forward(self, x_BNC: Tensor, caption: KeyValue | AbsorbedCaption) -> Tensor:
        """Read captions: (B, N, C) -> (B, N, C).

        The same modules are called in the same order whatever is absorbed: workers that shard weights must gather them in one order.
        """
        if isinstance(caption, AbsorbedCaption):
            return caption.read(x_BNC)
        if self.absorbs(caption, x_BNC.shape[1]):
            return self.absorb(caption).read(x_BNC)
        query = self._split(self.norm_q(self.query(x_BNC)))
        wide_query, key, value = (part.to(product_dtype(query)) for part in (query, caption.key, caption.value))
        mixed_BHND = F.scaled_dot_product_attention(wide_query, key, value, attn_mask=caption.mask).to(query.dtype)
        return self.out(mixed_BHND.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.view(*x_BNC.shape[:-1], self.num_heads, -1).transpose(1, 2)
