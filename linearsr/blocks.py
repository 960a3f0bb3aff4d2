"""The SANA transformer block: linear attention, cross-attention and Mix-FFN under AdaLN-single.

Shape suffixes: B batch, N tokens = H x W of the latent grid, T tag tokens, C width.
Source: method.md 2.2, 2.5.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearsr.attention import CrossAttention, LinearAttention
from linearsr.config import BackboneConfig


class MixFFN(nn.Module):
    """Gated feed-forward with a depthwise 3x3 convolution on the latent grid (GLUMBConv)."""

    def __init__(self, width: int, hidden: int) -> None:
        """Make the two pointwise projections and the depthwise convolution between them."""
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        """Transform tokens on their (H, W) grid: (B, N, C) -> (B, N, C)."""
        # A transposed view of (B, N, C) is channels-last in memory, so neither permutation copies.
        hidden = F.silu(self.up(x_BNC)).reshape(-1, *grid, self.depthwise.in_channels).permute(0, 3, 1, 2)  # (B, 2 hidden, H, W)
        value, gate = self.depthwise(hidden).chunk(2, dim=1)
        return self.down((value * F.silu(gate)).permute(0, 2, 3, 1).flatten(1, 2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One transformer block."""

    def __init__(self, config: BackboneConfig) -> None:
        """Make the block; its 6 x C modulation table starts at randn / sqrt(C), as in SANA."""
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = LinearAttention(width, config.head_width, qk_norm=config.qk_norm)
        self.cross = CrossAttention(width, config.num_cross_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ffn = MixFFN(width, config.ffn_width)
        self.table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(self, x_BNC: Tensor, tokens_BTC: Tensor, mask_BT: Tensor, modulation_B6C: Tensor, grid: tuple[int, int]) -> Tensor:
        """Apply the block: (B, N, C) -> (B, N, C). `modulation_B6C` is the network's shared time embedding."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.table + modulation_B6C).chunk(6, dim=1)  # (B, 1, C) each
        x_BNC = x_BNC + gate1 * self.attention(self.norm1(x_BNC) * (1 + scale1) + shift1)
        x_BNC = x_BNC + self.cross(x_BNC, tokens_BTC, mask_BT)
        transformed: Tensor = self.ffn(self.norm2(x_BNC) * (1 + scale2) + shift2, grid)
        return x_BNC + gate2 * transformed
