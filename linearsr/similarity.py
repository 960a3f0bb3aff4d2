"""PSNR, SSIM and MS-SSIM of luminance on torch alone, fast enough to measure at every validation.

Sums and differences of the two images stand for the images themselves: a pair needs four blurs instead of five, and rounding
of float32 falls on numerator and denominator alike, so that values stay within 1e-6 of float64 (tests/unit/test_similarity.py).
"""

from math import exp

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, relu

from linearsr.kernels import Kernels

IDENTICAL_PSNR_DB = 100.0
"""PSNR of identical images: finite, so that means and JSON survive it, and above any that differ visibly."""

_STUDIO, _STUDIO_BLACK = (65.481, 128.553, 24.966), 16.0
"""Y of BT.601 in studio range, [16, 235], from RGB in [0, 1]: as MATLAB and BasicSR."""
_FULL = (0.299, 0.587, 0.114)
"""Y of YIQ, [0, 1]."""
_RADIUS = 5
_SIGMA_PX = 1.5
_UNSCALED = [exp(-(offset**2) / (2 * _SIGMA_PX**2)) for offset in range(_RADIUS + 1)]
_TAPS = [tap / (2 * sum(_UNSCALED) - _UNSCALED[0]) for tap in _UNSCALED]
"""Half of an 11-tap Gaussian, from its middle outwards; the whole sums to 1."""
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the five scales of MS-SSIM, finest first."""
_MIDDLE = 255.0
"""About the middle of the sum of two images; variances are taken around it, where float32 is finest."""


def psnr_y(sr: Tensor, hr: Tensor, kernels: Kernels | None = None) -> Tensor:
    """Return the PSNR of studio-range Y in dB, (B,) float64, for RGB (B, 3, H, W) in [0, 1].

    Identical images give `IDENTICAL_PSNR_DB`. On a CPU `kernels`, which read both images once, take half the time or less.
    """
    if kernels is not None and kernels.takes(sr) and kernels.takes(hr):
        return kernels.luminance_psnr(sr, hr, _STUDIO, 255, IDENTICAL_PSNR_DB)
    error = _luminance(sr.float() - hr.float(), _STUDIO)
    mean = error.square_().mean(dim=(1, 2)).double()
    return (10 * torch.log10(255**2 / mean)).clamp(max=IDENTICAL_PSNR_DB)


def psnr(sr: Tensor, hr: Tensor) -> Tensor:
    """Return the PSNR of all three channels in dB, (B,) float64, for RGB (B, 3, H, W) in [0, 1]; see `psnr_y`."""
    mean = ((sr.float() - hr.float()) * 255).square_().mean(dim=(1, 2, 3)).double()
    return (10 * torch.log10(255**2 / mean)).clamp(max=IDENTICAL_PSNR_DB)


def ssim(sr: Tensor, hr: Tensor) -> Tensor:
    """Return the mean SSIM of the three channels, (B,) float64, for RGB (B, 3, H, W) in [0, 1] with sides of at least 11 px."""
    x, y = ((image.float() * 255).flatten(0, 1) for image in (sr, hr))
    luminance, structure = _similarity_maps(x + y, x - y)
    return (luminance * structure).mean(dim=(1, 2)).double().view(-1, 3).mean(dim=1)


def ssim_y(sr: Tensor, hr: Tensor) -> Tensor:
    """Return the SSIM of studio-range Y, (B,) float64, for RGB (B, 3, H, W) in [0, 1] with sides of at least 11 px.

    Source: Wang et al. 2004: 11-tap Gaussian of sigma 1.5, 'valid', K = (0.01, 0.03), L = 255.
    """
    x, y = _luminance(sr.float(), _STUDIO), _luminance(hr.float(), _STUDIO)
    luminance, structure = _similarity_maps(x + y + 2 * _STUDIO_BLACK, x - y)
    return (luminance * structure).mean(dim=(1, 2)).double()


def ms_ssim(sr: Tensor, hr: Tensor) -> Tensor:
    """Return the MS-SSIM of 8-bit Y of YIQ, (B,) float64, for RGB (B, 3, H, W) in [0, 1] with sides of at least 176 px.

    Source: Wang, Simoncelli and Bovik 2003, five scales, as pyiqa's `ms_ssim` computes it: Y rounded to whole levels, negative
    contrast-structure terms taken as 0, odd sides padded with black before they are halved.
    """
    x, y = ((_luminance(image.float(), _FULL) * 255).round_() for image in (sr, hr))
    total, difference = x + y, x - y
    value = torch.ones(len(sr), dtype=torch.float64, device=sr.device)
    for scale, weight in enumerate(_SCALE_WEIGHTS, start=1):
        luminance, structure = _similarity_maps(total, difference)
        term = relu(structure)
        if scale == len(_SCALE_WEIGHTS):
            term = luminance * term
        value = value * term.mean(dim=(1, 2)).double() ** weight
        pad = (total.shape[1] % 2, total.shape[2] % 2)
        total, difference = avg_pool2d(total, 2, padding=pad), avg_pool2d(difference, 2, padding=pad)
    return value


def _luminance(image: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """Weigh the channels of (B, 3, H, W) float32 into (B, H, W)."""
    batch, _, height, width = image.shape
    return torch.matmul(image.new_tensor(weights), image.flatten(2)).view(batch, height, width)


def _similarity_maps(total: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    """Return the luminance and the contrast-structure term of SSIM at every window.

    With s = x + y and d = x - y: 2 m_x m_y = (m_s^2 - m_d^2) / 2 and m_x^2 + m_y^2 = (m_s^2 + m_d^2) / 2, and likewise for
    the covariance and the variances.

    Args:
        total: x + y, (B, H, W), of images in [0, 255].
        difference: x - y.
    """
    centred = total - _MIDDLE
    mean_s, mean_d = _blur(centred), _blur(difference)
    var_s = _blur(centred.square_()).sub_(mean_s.square())
    square_d = mean_d.square_()
    var_d = _blur(difference.square()).sub_(square_d)
    square_s = mean_s.add_(_MIDDLE).square_()
    luminance = (square_s - square_d).add_(2 * _C1).div_(square_s.add_(square_d).add_(2 * _C1))
    structure = (var_s - var_d).add_(2 * _C2).div_(var_s.add_(var_d).add_(2 * _C2))
    return luminance, structure


def _blur(planes: Tensor) -> Tensor:
    """Blur (B, H, W) where the window fits: (B, H - 10, W - 10). Sums of shifted views: a third of the time of a convolution."""
    for axis in (1, 2):
        size = planes.shape[axis] - 2 * _RADIUS
        blurred = planes.narrow(axis, _RADIUS, size) * _TAPS[0]
        for offset, tap in enumerate(_TAPS[1:], start=1):
            blurred.add_(planes.narrow(axis, _RADIUS - offset, size), alpha=tap)
            blurred.add_(planes.narrow(axis, _RADIUS + offset, size), alpha=tap)
        planes = blurred
    return planes
