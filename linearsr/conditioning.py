"""What the network is told besides the noisy latent: the LR image, the tags and the noise level.

Shape suffixes: B batch, T tag tokens, C width.
"""

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LowResolutionStem(nn.Module):
    """Convolutions from LR pixels to the latent grid; no codec encoder is needed at inference.

    A grid with r LR pixels along a token's side needs log2(r) stride-2 convolutions: three for x4 with an f32
    codec, none when the codec's factor equals the scale (a stride-1 convolution then takes their place).
    Source: LinearSR section 3 (E_conv); method.md 2.8.
    """

    def __init__(self, lr_pixels_per_token: int, width: int) -> None:
        """Make the convolutions; channels double from 64 until the last, which has `width`."""
        super().__init__()
        halvings = lr_pixels_per_token.bit_length() - 1
        strides = [2] * halvings if halvings else [1, 1]
        hidden = [64 * 2**i for i in range(len(strides) - 1)]
        channels = [3, *[min(c, 128) for c in hidden], width]
        self.layers = nn.ModuleList(
            nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1)
            for c_in, c_out, stride in zip(channels[:-1], channels[1:], strides, strict=True)
        )

    def forward(self, lr: Tensor) -> Tensor:
        """Encode LR pixels in [-1, 1]: (B, 3, h, w) -> (B, width, h / r, w / r)."""
        for layer in self.layers[:-1]:
            lr = F.silu(layer(lr))
        return self.layers[-1](lr)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class TextEmbedding:
    """Captions as a frozen text encoder leaves them: what a network with `tags.encoder: text` takes in place of tag ids."""

    values: Tensor
    """(B, T, caption width), any float dtype."""
    mask: Tensor
    """(B, T) bool, True where a token is real."""


class TagEncoder(nn.Module):
    """Learned embedding of tag ids; id 0 is padding, and a token of its own stands for "no tags"."""

    def __init__(self, num_tags: int, caption_width: int, width: int) -> None:
        """Make the table and SANA's caption projection (MLP with tanh-GELU, then RMSNorm at scale 0.01)."""
        super().__init__()
        self.table = nn.Embedding(num_tags + 1, caption_width)
        self.projection = nn.Sequential(nn.Linear(caption_width, width), nn.GELU("tanh"), nn.Linear(width, width))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        nn.init.constant_(self.norm.weight, 0.01)

    def forward(self, tag_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Embed ids (B, T) into tokens (B, 1 + T, C) and their mask (B, 1 + T), True where a token is real.

        The first token is the empty-tag token. It is real only for a sample without tags, so none attends to nothing.
        """
        real_BT = tag_ids_BT > 0
        ids = F.pad(tag_ids_BT, (1, 0))
        mask = torch.cat([~real_BT.any(dim=1, keepdim=True), real_BT], dim=1)
        return self.norm(self.projection(self.table(ids))), mask


class TimeEmbedding(nn.Module):
    """Sinusoid of 1000 t and an MLP. Source: method.md 1.4."""

    FREQUENCIES = 128

    def __init__(self, width: int) -> None:
        """Make the MLP of the 256-wide sinusoid."""
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * self.FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed noise levels: (B,) float32 in [0, 1] -> (B, C); the sinusoid runs in float32."""
        index = torch.arange(self.FREQUENCIES, device=t_B.device, dtype=torch.float32)
        angles = 1000 * t_B.float()[:, None] * torch.exp(-log(10000) / self.FREQUENCIES * index)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype))  # type: ignore[no-any-return]
