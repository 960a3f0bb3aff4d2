"""One expert: a network and its latent space, from pixels to an estimate of the clean latent."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linearsr.backbone import Backbone, Conditioning
from linearsr.conditioning import TextEmbedding
from linearsr.config import LatentStatistics, ModelConfig
from linearsr.latent import LatentSpace


@dataclass(frozen=True)
class Condition:
    """What an image contributes to every step: the network's conditioning and the prior's mean."""

    network: Conditioning
    prior_mean: Tensor | None
    """(B, c, H, W) float32, or None without a prior."""


class SuperResolver(nn.Module):
    """Estimates clean latents from noisy ones, an LR image and tags."""

    def __init__(self, config: ModelConfig, statistics: LatentStatistics) -> None:
        """Build the network for `config`, untrained; `statistics` normalise latents."""
        super().__init__()
        self.config, self.statistics = config, statistics
        self.space = LatentSpace(config, statistics)
        self.network = Backbone(
            config.backbone,
            latent_channels=config.codec.latent_channels,
            lr_pixels_per_token=config.lr_pixels_per_token,
            num_tags=len(config.tags.vocabulary),
            caption_encoder=config.tags.encoder,
        )

    def condition(self, lr: Tensor, captions: Tensor | TextEmbedding) -> Condition:
        """Encode LR pixels (B, 3, h, w) in [-1, 1] and captions once, for all steps of a sampler; see `Backbone.prepare`."""
        return self._condition(lr, captions, reused=True)

    def denoise(self, z: Tensor, t: float | Tensor, condition: Condition) -> Tensor:
        """Estimate z_0 from z_t: (B, c, H, W) at noise level t, a number or (B,) -> (B, c, H, W) float32."""
        # A number is filled in on the device, where a tensor made of it would be copied there and waited for.
        t_B = t.to(z.device, torch.float32) if isinstance(t, Tensor) else torch.full((), t, dtype=torch.float32, device=z.device)
        t_B = t_B.expand(z.shape[0])
        t_B111 = t_B[:, None, None, None]
        if condition.prior_mean is None:
            return z - t_B111 * self.network(z, t_B, condition.network)  # type: ignore[no-any-return]
        known, deviation = self.space.residual_posterior(z - (1 - t_B111) * condition.prior_mean, t_B111)
        prediction = self.network(known, t_B, condition.network)
        return condition.prior_mean + self.space.sigma.on(z.device) * known + deviation * prediction  # type: ignore[no-any-return]

    def forward(self, z: Tensor, t: Tensor, lr: Tensor, captions: Tensor | TextEmbedding) -> Tensor:
        """Estimate z_0 in one call, as training does: see `condition` and `denoise`. Weights may be sharded."""
        return self.denoise(z, t, self._condition(lr, captions, reused=False))

    def _condition(self, lr: Tensor, captions: Tensor | TextEmbedding, *, reused: bool) -> Condition:
        mean = self.space.prior_mean(lr) if self.config.prior == "lr" else None
        return Condition(self.network.prepare(lr, captions, reused=reused), mean)
