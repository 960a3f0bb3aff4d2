"""Rectified flow: path, shift, training times, and the LR image as a Gaussian prior for the latent.

z_t = (1 - t) z_0 + t z_1 with z_0 the clean latent and z_1 standard normal; t = 1 is noise.

With `prior: lr`, z_0 = mu + r, where mu is the latent of the upsampled LR image and r has a known deviation sigma per
channel. Given z_t, r is Gaussian with mean m and deviation s, so the network reads m / sigma (which fades to nothing
at pure noise, where it knows nothing) and its output F gives z_0 = mu + m + s F: an untrained network is bicubic.
Source: method.md 1.1 to 1.4, 3.6; the preconditioning follows Karras et al. 2022 (EDM), section 5.
"""

import torch
from torch import Tensor

from linearsr.config import FlowConfig


def shift_time(u: float, shift: float) -> float:
    """Return t' = s u / (1 + (s - 1) u) for u in [0, 1]. Source: method.md 1.3."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_time(t: float, shift: float) -> float:
    """Return the u in [0, 1] that `shift_time` maps to t."""
    return t / (shift - (shift - 1) * t)


def sample_times(count: int, interval: tuple[float, float], config: FlowConfig, generator: torch.Generator) -> Tensor:
    """Draw noise levels of the shifted logit-normal truncated to `interval`, by inverse CDF: no rejection.

    Args:
        count: Number of draws.
        interval: (low, high) noise levels after shift, 0 <= low < high <= 1.
        config: Shift, and mean and deviation of the logit-normal.
        generator: Source of randomness, on the CPU.
    Returns:
        (count,) float32, each inside the closed interval.
    Source: method.md 3.6.
    """
    edges = torch.tensor([unshift_time(t, config.shift) for t in interval], dtype=torch.float64)
    low, high = torch.special.ndtr((torch.logit(edges) - config.logit_mean) / config.logit_std)
    quantile = low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)
    u = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(quantile))
    t = config.shift * u / (1 + (config.shift - 1) * u)
    if config.endpoint_fraction:
        at_end = torch.rand(count, generator=generator, dtype=torch.float64) < config.endpoint_fraction
        t = torch.where(at_end, interval[1], t)
    return t.clamp(*interval).float()


def interval_mass(interval: tuple[float, float], config: FlowConfig) -> float:
    """Return the probability that a training draw over all noise levels falls into `interval`.

    Args:
        interval: (low, high) noise levels after shift, 0 <= low < high <= 1; high belongs to it only if it is 1.
        config: Shift, mean and deviation of the logit-normal, and the share of draws at t = 1.
    Source: the distribution that `sample_times` draws from; method.md 3.6.
    """
    edges = torch.tensor([unshift_time(t, config.shift) for t in interval], dtype=torch.float64)
    low, high = ((torch.logit(edges) - config.logit_mean) / config.logit_std).tolist()
    # On the side of the median where both are small: a difference of two numbers near 1 would lose the far tail.
    sign = -1.0 if low > 0 else 1.0
    drawn = float(torch.special.ndtr(sign * torch.tensor([low, high], dtype=torch.float64)).diff().abs())
    return (1 - config.endpoint_fraction) * drawn + (config.endpoint_fraction if interval[1] == 1 else 0.0)


def interpolate(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return z_t on the straight path: (B, c, H, W), (B, c, H, W), (B, 1, 1, 1) -> (B, c, H, W)."""
    return (1 - t) * clean + t * noise


def residual_posterior(excess: Tensor, t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of the residual r given z_t, when r ~ N(0, sigma^2) beforehand.

    Args:
        excess: z_t - (1 - t) mu, which is (1 - t) r + t z_1, (B, c, H, W).
        t: Noise level, (B, 1, 1, 1).
        sigma: Prior deviation per channel, (1, c, 1, 1).
    Returns:
        Mean (B, c, H, W) and deviation (B, c, 1, 1).
    Source: Bayes' rule for two Gaussians.
    """
    signal_variance = ((1 - t) * sigma) ** 2
    total = signal_variance + t**2
    mean = (1 - t) * sigma**2 / total * excess
    return mean, sigma * t / total.sqrt()
