"""Measurement of latent statistics: what normalises latents, and how much LR leaves open."""

import torch
from torch import Tensor

from linearsr.config import LatentStatistics, ModelConfig
from linearsr.latent import LatentSpace

SMALLEST_STD = 1e-3
"""Floor of every deviation, of latents in units of pixels in [-1, 1], of what LR leaves open in units of the latents' deviation:
channels that never vary must not be blown up."""


def measure_statistics(config: ModelConfig, hr: Tensor, lr: Tensor) -> LatentStatistics:
    """Measure per-channel statistics on training pairs.

    A codec with a scaling factor of its own, DC-AE, keeps it, as SANA has it: mean 0, one deviation for all channels. Then only
    what LR leaves open is measured, and that only for a model with the LR prior; without it nothing is encoded.

    Args:
        config: Codec and scale.
        hr: Crops (B, 3, H, W) in [-1, 1].
        lr: The same, degraded, (B, 3, H / scale, W / scale) in [-1, 1].
    """
    channels = config.codec.latent_channels
    raw = LatentSpace(config, LatentStatistics(mean=(0.0,) * channels, std=(1.0,) * channels, residual_std=(1.0,) * channels))
    scaling = raw.codec.scaling_factor
    if scaling is not None and config.prior == "none":
        return LatentStatistics(mean=(0.0,) * channels, std=(1 / scaling,) * channels, residual_std=(1.0,) * channels)
    latent = raw.encode(hr)
    if scaling is None:
        mean, std = latent.mean(dim=(0, 2, 3)), latent.std(dim=(0, 2, 3)).clamp_min(SMALLEST_STD)
    else:
        mean, std = torch.zeros(channels), torch.full((channels,), 1 / scaling, dtype=torch.float64)
    residual = (latent - raw.prior_mean(lr)) / std.to(latent)[:, None, None]
    spread = residual.square().mean(dim=(0, 2, 3)).sqrt().clamp_min(SMALLEST_STD)
    return LatentStatistics(mean=_floats(mean), std=_floats(std), residual_std=_floats(spread))


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in values.to(torch.float64))
