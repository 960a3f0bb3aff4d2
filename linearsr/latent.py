"""The latent space of a model: codec, normalisation and the LR prior. Everything here runs in float32."""

import torch
from torch import Tensor
from torch.nn import functional as F

from linearsr.codec import make_codec
from linearsr.config import LatentStatistics, ModelConfig
from linearsr.constants import Constant
from linearsr.flow import residual_posterior


def upsample_bicubic(lr: Tensor, scale: int) -> Tensor:
    """Enlarge (B, 3, h, w) `scale` times with the bicubic kernel of Pillow (a = -0.5)."""
    if scale == 1:
        return lr
    # `antialias` changes nothing when enlarging but the kernel: without it torch uses a = -0.75.
    return F.interpolate(lr, scale_factor=scale, mode="bicubic", antialias=True)


class LatentSpace:
    """Maps pixels to normalised latents and back, and knows how far an uninformed estimate lies from the truth."""

    def __init__(self, config: ModelConfig, statistics: LatentStatistics) -> None:
        """Keep codec and statistics.

        Raises:
            ValueError: if the statistics have another number of channels than the codec.
            CodecError: if the codec's weights are not there.
        """
        channels = config.codec.latent_channels
        if len(statistics.std) != channels:
            raise ValueError(f"statistics: got {len(statistics.std)} channels; expected {channels} for codec {config.codec}")
        self.config, self.codec = config, make_codec(config.codec)
        self.mean, self.std, self.sigma = (
            Constant(torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1))
            for values in (statistics.mean, statistics.std, statistics.residual_std)
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """Turn (B, 3, H, W) in [-1, 1] into a normalised latent (B, c, H / f, W / f), float32."""
        return self.normalise(self.codec.encode(pixels.float()))

    def normalise(self, latent: Tensor) -> Tensor:
        """Normalise what the codec made, (B, c, h, w) of any float dtype, to float32."""
        return (latent.float() - self.mean.on(latent.device)) / self.std.on(latent.device)

    def decode(self, latent: Tensor) -> Tensor:
        """Turn a normalised latent (B, c, h, w) into pixels (B, 3, h f, w f), clamped to [-1, 1]."""
        return self.codec.decode(latent * self.std.on(latent.device) + self.mean.on(latent.device)).clamp(-1, 1)

    def prior_mean(self, lr: Tensor) -> Tensor:
        """Return the latent of the bicubic upsampling of `lr` (B, 3, h, w) in [-1, 1]: the mean of the LR prior."""
        return self.encode(upsample_bicubic(lr.float(), self.config.scale))

    def residual_posterior(self, excess: Tensor, t_B111: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (in units of the prior's deviation) and deviation of z_0 - mu; see `flow.residual_posterior`."""
        sigma = self.sigma.on(excess.device)
        mean, deviation = residual_posterior(excess, t_B111, sigma)
        return mean / sigma, deviation

    def error_scale(self, t_B111: Tensor) -> Tensor:
        """Return how far a fresh network's estimate lies from z_0 at t, as a deviation (B, c or 1, 1, 1).

        Dividing the error by it gives the flow-matching velocity error (`none`), or a unit-variance one (`lr`).
        """
        if self.config.prior == "none":
            return t_B111
        return self.residual_posterior(torch.zeros_like(t_B111), t_B111)[1]

    def loss_weights(self) -> Tensor:
        """Return the weight of each channel's squared error, (1, c, 1, 1) with mean 1; see `FlowConfig.loss_weighting`."""
        if self.config.flow.loss_weighting == "latent":
            return torch.ones_like(self.std.value)
        # Only orthonormal codecs get here (`ModelConfig`), so a channel's open variance in the picture is that of its residual in pixels.
        spread = self.std.value * self.sigma.value if self.config.prior == "lr" else self.std.value
        return spread.square() / spread.square().mean()
