"""ReLU linear attention in O(N), and cross-attention to tag tokens.

Shape suffixes: B batch, N image tokens, T tag tokens, C width, H heads, D head width.
Source: SANA (arXiv 2410.10629) section 3.2; method.md 2.2, 2.3.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Probe = Callable[[Tensor, Tensor], None]
"""Is shown the input (B, N, C) of a linear attention and the normaliser (B, H, N, 1) of its queries."""


def relu_linear_attention(
    q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, *, eps: float = 1e-15, on_normaliser: Callable[[Tensor], None] | None = None
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
    wide = torch.promote_types(v_BHND.dtype, torch.float32)
    query, key, value = F.relu(q_BHND).to(wide), F.relu(k_BHND).to(wide), v_BHND.to(wide)
    state_BHDD = key.transpose(-1, -2) @ value  # (B, H, D, D)
    key_sum_BHD1 = key.sum(dim=-2, keepdim=True).transpose(-1, -2)  # (B, H, D, 1)
    normaliser_BHN1 = query @ key_sum_BHD1
    if on_normaliser is not None:
        on_normaliser(normaliser_BHN1)
    return ((query @ state_BHDD) / (normaliser_BHN1 + eps)).to(v_BHND.dtype)  # (B, H, N, D)


class LinearAttention(nn.Module):
    """Self-attention over image tokens with linear cost."""

    probe: Probe | None = None
    """Looks on at every pass while it is set."""

    def __init__(self, width: int, head_width: int, *, qk_norm: bool = False) -> None:
        """Make projections; `qkv` has no bias, `out` has one, as in SANA."""
        super().__init__()
        self.head_width = head_width
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.norm_q = nn.RMSNorm(width, eps=1e-5) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(width, eps=1e-5) if qk_norm else nn.Identity()

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Mix tokens: (B, N, C) -> (B, N, C)."""
        query, key, value = self.qkv(x_BNC).chunk(3, dim=-1)
        heads = [part.unflatten(-1, (-1, self.head_width)).transpose(1, 2) for part in (self.norm_q(query), self.norm_k(key), value)]
        probe = self.probe
        mixed_BHND = relu_linear_attention(*heads, on_normaliser=None if probe is None else lambda normaliser: probe(x_BNC, normaliser))
        return self.out(mixed_BHND.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """Softmax attention from image tokens to the few tag tokens."""

    def __init__(self, width: int, num_heads: int) -> None:
        """Make projections, all with bias, as in SANA."""
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BNC: Tensor, tokens_BTC: Tensor, mask_BT: Tensor) -> Tensor:
        """Read tags: (B, N, C) x (B, T, C) -> (B, N, C); `mask_BT` is True where a token is real, and one must be."""
        query = self._split(self.query(x_BNC))
        key, value = (self._split(part) for part in self.key_value(tokens_BTC).chunk(2, dim=-1))
        mixed_BHND = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_BT[:, None, None, :])
        return self.out(mixed_BHND.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.reshape(*x_BNC.shape[:2], self.num_heads, -1).transpose(1, 2)
