"""Colour fixes: give an enlarged picture the colours of its source, which a sampler does not keep by itself.

Source: method.md 6.7; AdaIN as in SeeSR, the wavelet one as in StableSR.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

ColourFix = Literal["wavelet", "adain", "none"]
"""`wavelet`: low frequencies of the source; `adain`: mean and deviation of each channel of the source; `none`: as it comes."""

WAVELET_LEVELS = 5
"""A-trous levels: the low band is what a blur of 2 (2^5 - 1) + 1 = 63 px leaves."""


def low_band(x: Tensor) -> Tensor:
    """Return what 5 a-trous levels of the kernel [1, 2, 1] x [1, 2, 1] / 16 leave of (B, C, H, W), edges repeated.

    Level i dilates the kernel by 2^i pixels. The kernel is applied one axis at a time, which is the same and cheaper.
    """
    height, width = x.shape[2:]
    for level in range(WAVELET_LEVELS):
        step = 2**level
        rows = F.pad(x, (0, 0, step, step), mode="replicate")
        x = rows[:, :, :height].add(rows[:, :, 2 * step :]).mul_(0.25).add_(x, alpha=0.5)
        columns = F.pad(x, (step, step, 0, 0), mode="replicate")
        x = columns[..., :width].add(columns[..., 2 * step :]).mul_(0.25).add_(x, alpha=0.5)
    return x


def wavelet(picture: Tensor, source: Tensor) -> Tensor:
    """Keep the high band of `picture` and take the low band of `source`, both (B, C, H, W) in [0, 1]; the result is not clamped."""
    # The band is linear, so one pass over the difference does what two over the pictures would.
    return picture + low_band(source - picture)


def adain(picture: Tensor, source: Tensor) -> Tensor:
    """Give each channel of `picture` the mean and deviation of `source`, both (B, C, H, W) in [0, 1]; the result is not clamped.

    Variances are unbiased, plus 1e-5.
    """
    moments = [torch.var_mean(x, dim=(2, 3), correction=1, keepdim=True) for x in (picture, source)]
    (deviation, mean), (wanted_deviation, wanted_mean) = [((variance + 1e-5).sqrt(), mean) for variance, mean in moments]
    return (picture - mean) / deviation * wanted_deviation + wanted_mean


FIXES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"wavelet": wavelet, "adain": adain, "none": lambda picture, _: picture}
"""Every colour fix by its name."""


def fix_colours(picture: Tensor, source: Tensor, kind: str) -> Tensor:
    """Apply the named colour fix in float32 and clamp to [0, 1].

    Args:
        picture: (B, 3, H, W) in [0, 1].
        source: LR picture upsampled to the same size, (B, 3, H, W) in [0, 1].
        kind: `wavelet`, `adain` or `none`, which returns `picture` itself.

    Raises:
        ValueError: for another kind, or another size of the source.
    """
    if kind not in FIXES:
        raise ValueError(f"colour fix: got {kind!r}; expected one of {', '.join(FIXES)}")
    if kind == "none":
        return picture
    if picture.shape != source.shape:
        raise ValueError(f"colour fix: got a source {tuple(source.shape)}; expected the picture's {tuple(picture.shape)}")
    return FIXES[kind](picture.float(), source.float()).clamp(0, 1)
