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
from linearsr.schedule import shift_time, unshift_time

SMALLEST_TIME = 1e-5
"""No noise level below it is drawn: in float32 the error of an estimate, which shrinks with t, would be lost in rounding."""


def sample_times(count: int, interval: tuple[float, float], config: FlowConfig, generator: torch.Generator) -> Tensor:
    """Draw noise levels of the shifted logit-normal truncated to `interval`, by inverse CDF: no rejection.

    Args:
        count: Number of draws.
        interval: (low, high) noise levels after shift, 0 <= low < high <= 1.
        config: Shift, and mean and deviation of the logit-normal.
        generator: Source of randomness, on the CPU.
    Returns:
        (count,) float32, each inside [low, high), or [low, 1] if high is 1: `route` sends all to the interval's owner.
    Source: method.md 3.6.
    """
    low, high, sign = _quantiles(interval, config)
    quantile = low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)
    u = torch.sigmoid(config.logit_mean + config.logit_std * sign * torch.special.ndtri(quantile))
    t = shift_time(u, config.shift)
    if config.endpoint_fraction:
        at_end = torch.rand(count, generator=generator, dtype=torch.float64) < config.endpoint_fraction
        t = torch.where(at_end, interval[1], t)
    return _into(t, interval)


def _quantiles(interval: tuple[float, float], config: FlowConfig) -> tuple[Tensor, Tensor, float]:
    """Return the normal quantiles of both edges and their sign: -1 where they are those of the mirrored distribution.

    They are taken on the side of the median where both are small, for near 1 float64 has no far tail.
    """
    edges = torch.tensor([unshift_time(t, config.shift) for t in interval], dtype=torch.float64)
    scores = (torch.logit(edges) - config.logit_mean) / config.logit_std
    sign = -1.0 if scores[0] > 0 else 1.0
    # torch's `ndtr` is 1 - 1 + something in the tail, and 0 from a score of -9 on.
    low, high = torch.special.erfc(-sign * scores / 2**0.5) / 2
    return low, high, sign


def _into(t: Tensor, interval: tuple[float, float]) -> Tensor:
    """Round float64 noise levels to float32 without leaving the interval: rounding alone may cross an edge by half a unit."""
    low, high = (torch.tensor(edge, dtype=torch.float64) for edge in (max(interval[0], SMALLEST_TIME), interval[1]))
    lowest, highest = low.float(), high.float()
    if lowest < low:
        lowest = torch.nextafter(lowest, torch.ones(()))
    if highest >= high and interval[1] < 1:
        highest = torch.nextafter(highest, torch.zeros(()))
    return t.float().clamp(lowest, highest)


def interval_mass(interval: tuple[float, float], config: FlowConfig) -> float:
    """Return the probability that a training draw over all noise levels falls into `interval`.

    Args:
        interval: (low, high) noise levels after shift, 0 <= low < high <= 1; high belongs to it only if it is 1.
        config: Shift, mean and deviation of the logit-normal, and the share of draws at t = 1.
    Source: the distribution that `sample_times` draws from; method.md 3.6.
    """
    low, high, _ = _quantiles(interval, config)
    drawn = float((high - low).abs())
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
