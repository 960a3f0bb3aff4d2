"""What the network is told besides the noisy latent: the LR image, the tags or caption, and the noise level.

Shape suffixes: B batch, T caption tokens, C width.
"""

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LowResolutionStem(nn.Module):
    """Convolutions from LR pixels to the latent grid; no codec encoder is needed at inference.

    A grid with r LR pixels along a token's side needs log2(r) stride-2 convolutions: three for x4 with an f32
    codec, none when the codec's factor equals the scale (two stride-1 convolutions then take their place).
    Source: LinearSR section 3 (E_conv); method.md 2.8.
    """

    def __init__(self, lr_pixels_per_token: int, width: int) -> None:
        """Make the convolutions; channels are 64, then 128, and `width` of the last."""
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

    def trimmed(self) -> tuple[Tensor, Tensor | None]:
        """Return values and mask without the tokens that are padding in every sample; no mask where all that is left is real.

        Looks at the mask's content, so on a GPU it waits for the device.
        """
        keep_T = self.mask.any(dim=0)
        keep_T[:1] = True  # a caption that is all padding keeps one token, which the mask hides
        mask_BT = self.mask[:, keep_T]
        return self.values[:, keep_T], None if bool(mask_BT.all()) else mask_BT


class CaptionProjection(nn.Module):
    """SANA's way from caption embeddings to tokens: an MLP with tanh-GELU, then RMSNorm whose scale starts at 0.01."""

    def __init__(self, caption_width: int, width: int) -> None:
        """Make the MLP and the norm."""
        super().__init__()
        self.projection = nn.Sequential(nn.Linear(caption_width, width), nn.GELU("tanh"), nn.Linear(width, width))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        nn.init.constant_(self.norm.weight, 0.01)

    def forward(self, values_BTE: Tensor) -> Tensor:
        """Project embeddings: (B, T, caption width) -> (B, T, C)."""
        return self.norm(self.projection(values_BTE))  # type: ignore[no-any-return]


class TagEncoder(CaptionProjection):
    """Learned embeddings of tag ids in front of the projection; id 0 is padding."""

    def __init__(self, num_tags: int, caption_width: int, width: int) -> None:
        """Make the table of `num_tags` embeddings and one for "no tags"."""
        table = nn.Embedding(num_tags + 1, caption_width)
        super().__init__(caption_width, width)
        self.table = table

    def embed(self, tag_ids_BT: Tensor) -> TextEmbedding:
        """Look ids (B, T) up: values (B, 1 + T, caption width) and their mask.

        The first token is the empty-tag token. It is real only for a sample without tags, so none attends to nothing.
        """
        real_BT = tag_ids_BT > 0
        mask = torch.cat([~real_BT.any(dim=1, keepdim=True), real_BT], dim=1)
        return TextEmbedding(self.table(F.pad(tag_ids_BT, (1, 0))), mask)


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
