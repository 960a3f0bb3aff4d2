"""The network: a SANA-style linear-attention transformer that also sees the LR image.

Shape suffixes: B batch, N tokens, C width. Source: method.md 2.1, 2.2, 2.8.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from linearsr.attention import AbsorbedCaption, CrossAttention, KeyValue
from linearsr.blocks import Block
from linearsr.conditioning import CaptionProjection, LowResolutionStem, TagEncoder, TextEmbedding, TimeEmbedding
from linearsr.config import BackboneConfig
from linearsr.fused import modulated_norm


@dataclass(frozen=True)
class Conditioning:
    """What stays the same over all sampler steps of an image."""

    lr_features: Tensor
    """(B, stem width, H, W)."""
    captions: tuple[KeyValue | AbsorbedCaption, ...]
    """The caption as each block reads it."""


class Backbone(nn.Module):
    """One token a latent position; patch size 1, no positional embedding."""

    def __init__(
        self,
        shape: BackboneConfig,
        *,
        latent_channels: int,
        lr_pixels_per_token: int,
        num_tags: int = 0,
        caption_encoder: Literal["learned", "text"] = "learned",
    ) -> None:
        """Make the network; its output layer starts at zero, so that an untrained one predicts nothing.

        Args:
            shape: Sizes of the transformer.
            latent_channels: Channels of the latent, c.
            lr_pixels_per_token: LR pixels along one side of a token, a power of two.
            num_tags: Size of the tag vocabulary; of no effect on a network that takes text embeddings.
            caption_encoder: See `TagsConfig.encoder`.
        """
        super().__init__()
        self.stem = LowResolutionStem(lr_pixels_per_token, shape.stem_width)
        self.tags = (
            TagEncoder(num_tags, shape.caption_width, shape.width)
            if caption_encoder == "learned"
            else CaptionProjection(shape.caption_width, shape.width)
        )
        self.time = TimeEmbedding(shape.width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(shape.width, 6 * shape.width))
        self.embed = nn.Linear(latent_channels + shape.stem_width, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_blocks))
        self.table = nn.Parameter(torch.randn(2, shape.width) / shape.width**0.5)
        self.head = nn.Linear(shape.width, latent_channels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def prepare(self, lr: Tensor, captions: Tensor | TextEmbedding, *, reused: bool = False) -> Conditioning:
        """Encode what does not depend on the noise level, once an image.

        Tokens that are padding in the whole batch are left out, except in training on a GPU, where looking for them would make the
        host wait for the device at every step.

        Args:
            lr: LR pixels (B, 3, h, w) in [-1, 1].
            captions: Tag ids (B, T) int64, 0 for padding; or text embeddings, for a network with `caption_encoder="text"`.
            reused: It is for several steps of a sampler: short captions are absorbed here, once. No weights may be sharded.

        Raises:
            ValueError: if the network takes the other kind of captions.
        """
        dtype = self.embed.weight.dtype
        text = self._embedding(captions)
        waits = torch.is_grad_enabled() and text.mask.device.type != "cpu"
        values, mask = (text.values, text.mask) if waits else text.trimmed()
        tokens_BTC = self.tags(values.to(dtype))
        lr_features = self.stem(lr.to(dtype))

        def read_by(cross: CrossAttention) -> KeyValue | AbsorbedCaption:
            caption = cross.project(tokens_BTC, mask)
            return cross.absorb(caption) if reused and cross.absorbs(caption, lr_features[0, 0].numel()) else caption

        return Conditioning(lr_features, tuple(read_by(block.cross) for block in self.blocks))  # type: ignore[arg-type]

    def _embedding(self, captions: Tensor | TextEmbedding) -> TextEmbedding:
        if isinstance(self.tags, TagEncoder) and isinstance(captions, Tensor):
            return self.tags.embed(captions)
        if isinstance(self.tags, TagEncoder) or isinstance(captions, Tensor):
            expected = "tag ids" if isinstance(self.tags, TagEncoder) else "a TextEmbedding"
            where = f"Backbone.prepare: got {type(captions).__name__}; expected {expected}"
            raise ValueError(f"{where}; fix: set `tags.encoder` to what the captions are")  # noqa: TRY004 (a setting, not a bug)
        return captions

    def forward(self, z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict from the latent: (B, c, H, W), (B,) in [0, 1] -> (B, c, H, W) float32."""
        dtype = self.embed.weight.dtype
        grid = (z.shape[2], z.shape[3])
        x = torch.cat([z.to(dtype), conditioning.lr_features], dim=1)  # (B, c + stem, H, W)
        x_BNC = self.embed(x.flatten(2).transpose(1, 2))
        time_BC = self.time(t, dtype)
        modulation_B6C = self.modulation(time_BC).unflatten(1, (6, -1))
        for block, caption in zip(self.blocks, conditioning.captions, strict=True):
            x_BNC = block(x_BNC, caption, modulation_B6C, grid)
        shift, scale = (self.table + time_BC[:, None]).chunk(2, dim=1)
        out_BNC = self.head(modulated_norm(x_BNC, shift, scale))
        return out_BNC.transpose(1, 2).unflatten(2, grid).float()  # type: ignore[no-any-return]
