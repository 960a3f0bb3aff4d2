"""ReLU linear attention in O(N), and cross-attention to caption tokens.

Shape suffixes: B batch, N image tokens, T caption tokens, C width, H heads, D head width.
Source: SANA (arXiv 2410.10629) section 3.2; method.md 2.2, 2.3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearsr.fused import relu_attention
from linearsr.linear import Linear, product_dtype

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


class LinearAttention(nn.Module):
    """Self-attention over image tokens with linear cost."""

    probe: Probe | None = None
    """Looks on at every pass while it is set."""

    def __init__(self, width: int, head_width: int, *, qk_norm: bool = False) -> None:
        """Make projections; `qkv` has no bias, `out` has one, as in SANA."""
        super().__init__()
        self.head_width = head_width
        self.qkv = Linear(width, 3 * width, bias=False)
        self.out = Linear(width, width)
        self.norm_q = nn.RMSNorm(width, eps=1e-5) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(width, eps=1e-5) if qk_norm else nn.Identity()
        self.qk_norm = qk_norm

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Mix tokens: (B, N, C) -> (B, N, C)."""
        qkv_BNC3 = self.qkv(x_BNC)
        if self.qk_norm:
            query, key, value = qkv_BNC3.chunk(3, dim=-1)
            qkv_BNC3 = torch.cat([self.norm_q(query), self.norm_k(key), value], dim=-1)
        mixed_BNC, normaliser = relu_attention(qkv_BNC3, self.head_width, EPS)
        if self.probe is not None:
            self.probe(x_BNC, normaliser)
        return self.out(mixed_BNC)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class KeyValue:
    """Captions as one cross-attention reads them; they do not depend on the noise level, so one will do for all steps."""

    key: Tensor
    """(B, H, T, D)."""
    value: Tensor
    """(B, H, T, D)."""
    mask: Tensor | None
    """(B, 1, 1, T) bool, True where a token is read; None where all are."""


class CrossAttention(nn.Module):
    """Softmax attention from image tokens to the few caption tokens."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool = False) -> None:
        """Make projections, all with bias, as in SANA."""
        super().__init__()
        self.num_heads = num_heads
        self.query = Linear(width, width)
        self.key_value = Linear(width, 2 * width)
        self.out = Linear(width, width)
        self.norm_q = nn.RMSNorm(width, eps=1e-5) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(width, eps=1e-5) if qk_norm else nn.Identity()

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

    def forward(self, x_BNC: Tensor, caption: KeyValue) -> Tensor:
        """Read captions: (B, N, C) -> (B, N, C)."""
        query = self._split(self.norm_q(self.query(x_BNC)))
        wide_query, key, value = (part.to(product_dtype(query)) for part in (query, caption.key, caption.value))
        mixed_BHND = F.scaled_dot_product_attention(wide_query, key, value, attn_mask=caption.mask).to(query.dtype)
        return self.out(mixed_BHND.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.view(*x_BNC.shape[:-1], self.num_heads, -1).transpose(1, 2)
