"""The SANA transformer block: linear attention, cross-attention and Mix-FFN under AdaLN-single.

Shape suffixes: B batch, N tokens = H x W of the latent grid, T caption tokens, C width.
Source: method.md 2.2, 2.5.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from linearsr.attention import AbsorbedCaption, CrossAttention, KeyValue, LinearAttention
from linearsr.config import BackboneConfig
from linearsr.depthwise import gated_depthwise
from linearsr.forward_only import mix_ffn, works_forward_only
from linearsr.fused import modulated_norm
from linearsr.kernels import UsesKernels
from linearsr.linear import LendingLinear


class GatedDepthwise(nn.Conv2d, UsesKernels):
    """SiLU, a depthwise 3x3 convolution and a SiLU gate; a module of its own, so that its weights can be sharded like any."""

    def __init__(self, hidden: int) -> None:
        """Make the convolution over 2 x `hidden` channels."""
        super().__init__(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)

    def forward(  # type: ignore[override]
        self, hidden_BNF2: Tensor, grid: tuple[int, int], use: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    ) -> Tensor:
        """Transform tokens on their (H, W) grid: (B, N, 2 F) -> (B, N, F); or lend the weights, as `LendingLinear` does."""
        assert self.bias is not None  # noqa: S101 (made with one)
        if use is not None:
            return use(hidden_BNF2, self.weight, self.bias)
        return gated_depthwise(hidden_BNF2, self.weight, self.bias, grid, self.kernels)


class MixFFN(nn.Module):
    """Gated feed-forward with a depthwise 3x3 convolution on the latent grid (GLUMBConv)."""

    def __init__(self, width: int, hidden: int) -> None:
        """Make the two pointwise projections and the depthwise convolution between them."""
        super().__init__()
        self.up = LendingLinear(width, 2 * hidden)
        self.depthwise = GatedDepthwise(hidden)
        self.down = LendingLinear(hidden, width, bias=False)

    def forward(self, x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        """Transform tokens on their (H, W) grid: (B, N, C) -> (B, N, C)."""
        if works_forward_only(x_BNC):
            return self._forward_only(x_BNC, grid)
        return self.down(self.depthwise(self.up(x_BNC), grid))  # type: ignore[no-any-return]

    def _forward_only(self, x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        """Call the same modules in the same order, one inside the other, so that all weights are lent at once."""

        def with_up(x_BNC: Tensor, up: Tensor, bias: Tensor) -> Tensor:
            def with_kernel(x_BNC: Tensor, kernel: Tensor, offset: Tensor) -> Tensor:
                kernels = self.depthwise.kernels
                return self.down(  # type: ignore[no-any-return]
                    x_BNC, use=lambda x, down, _: mix_ffn(x, (up, bias), (kernel, offset), down, grid, kernels)
                )

            return self.depthwise(x_BNC, grid, use=with_kernel)  # type: ignore[no-any-return]

        return self.up(x_BNC, use=with_up)  # type: ignore[no-any-return]


class Block(nn.Module):
    """One transformer block."""

    def __init__(self, config: BackboneConfig) -> None:
        """Make the block; its 6 x C modulation table starts at randn / sqrt(C), as in SANA."""
        super().__init__()
        width = config.width
        self.attention = LinearAttention(width, config.head_width, qk_norm=config.qk_norm)
        self.cross = CrossAttention(width, config.num_cross_heads, qk_norm=config.qk_norm)
        self.ffn = MixFFN(width, config.ffn_width)
        self.table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(self, x_BNC: Tensor, caption: KeyValue | AbsorbedCaption, modulation_B6C: Tensor, grid: tuple[int, int]) -> Tensor:
        """Apply the block: (B, N, C) -> (B, N, C).

        Args:
            x_BNC: Tokens of the (H, W) grid in row-major order.
            caption: What this block's cross-attention made of the caption; see `CrossAttention.project` and `absorb`.
            modulation_B6C: The network's shared time embedding.
            grid: (H, W).
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.table + modulation_B6C).chunk(6, dim=1)  # (B, 1, C) each
        x_BNC = torch.addcmul(x_BNC, gate1, self.attention(modulated_norm(x_BNC, shift1, scale1)))
        x_BNC = x_BNC + self.cross(x_BNC, caption)
        return torch.addcmul(x_BNC, gate2, self.ffn(modulated_norm(x_BNC, shift2, scale2), grid))
