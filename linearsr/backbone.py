"""The network: a SANA-style linear-attention transformer that also sees the LR image.

Shape suffixes: B batch, N tokens, C width. Source: method.md 2.1, 2.2, 2.8.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linearsr.blocks import Block
from linearsr.conditioning import LowResolutionStem, TagEncoder, TimeEmbedding
from linearsr.config import BackboneConfig


@dataclass(frozen=True)
class Conditioning:
    """What stays the same over all sampler steps of an image."""

    lr_features: Tensor
    """(B, stem width, H, W)."""
    tokens: Tensor
    """(B, 1 + T, C)."""
    mask: Tensor
    """(B, 1 + T) bool."""


class Backbone(nn.Module):
    """One token a latent position; patch size 1, no positional embedding."""

    def __init__(self, shape: BackboneConfig, *, latent_channels: int, lr_pixels_per_token: int, num_tags: int) -> None:
        """Make the network; its output layer starts at zero, so that an untrained one predicts nothing.

        Args:
            shape: Sizes of the transformer.
            latent_channels: Channels of the latent, c.
            lr_pixels_per_token: LR pixels along one side of a token, a power of two.
            num_tags: Size of the tag vocabulary.
        """
        super().__init__()
        self.stem = LowResolutionStem(lr_pixels_per_token, shape.stem_width)
        self.tags = TagEncoder(num_tags, shape.caption_width, shape.width)
        self.time = TimeEmbedding(shape.width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(shape.width, 6 * shape.width))
        self.embed = nn.Linear(latent_channels + shape.stem_width, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_blocks))
        self.norm = nn.LayerNorm(shape.width, eps=1e-6, elementwise_affine=False)
        self.table = nn.Parameter(torch.randn(2, shape.width) / shape.width**0.5)
        self.head = nn.Linear(shape.width, latent_channels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def prepare(self, lr: Tensor, tag_ids: Tensor) -> Conditioning:
        """Encode LR pixels (B, 3, h, w) in [-1, 1] and tag ids (B, T), once an image."""
        tokens, mask = self.tags(tag_ids)
        return Conditioning(self.stem(lr.to(self.embed.weight.dtype)), tokens, mask)

    def forward(self, z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict from the latent: (B, c, H, W), (B,) in [0, 1] -> (B, c, H, W) float32."""
        dtype = self.embed.weight.dtype
        grid = (z.shape[2], z.shape[3])
        x = torch.cat([z.to(dtype), conditioning.lr_features], dim=1)  # (B, c + stem, H, W)
        x_BNC = self.embed(x.flatten(2).transpose(1, 2))
        time_BC = self.time(t, dtype)
        modulation_B6C = self.modulation(time_BC).unflatten(1, (6, -1))
        for block in self.blocks:
            x_BNC = block(x_BNC, conditioning.tokens, conditioning.mask, modulation_B6C, grid)
        shift, scale = (self.table + time_BC[:, None]).chunk(2, dim=1)
        out_BNC = self.head(self.norm(x_BNC) * (1 + scale) + shift)
        return out_BNC.transpose(1, 2).unflatten(2, grid).float()  # type: ignore[no-any-return]
