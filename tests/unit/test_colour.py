"""Colour fixes against their definitions, and that they do to a shifted picture what they are for."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from linearsr.colour import adain, fix_colours, low_band, wavelet


def pictures(height: int = 48, width: int = 70) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(2, 3, height, width, generator=generator)
    source = F.interpolate(torch.rand(2, 3, height // 4, width // 4, generator=generator), size=(height, width), mode="bicubic").clamp(0, 1)
    return picture, source


def low_band_by_definition(x: Tensor) -> Tensor:
    """method.md 6.7, as a 3x3 convolution for each level."""
    kernel = (torch.tensor([1.0, 2, 1])[:, None] * torch.tensor([1.0, 2, 1]) / 16).expand(x.shape[1], 1, 3, 3)
    for level in range(5):
        padded = F.pad(x, (2**level,) * 4, mode="replicate")
        x = F.conv2d(padded, kernel, dilation=2**level, groups=x.shape[1])
    return x


@pytest.mark.parametrize("size", [(48, 70), (5, 3)])  # The widest kernel reaches farther than the second picture.
def test_wavelet_is_the_high_band_of_the_picture_and_the_low_band_of_the_source(size: tuple[int, int]) -> None:
    picture, source = (F.interpolate(x, size=size) for x in pictures())
    torch.testing.assert_close(low_band(picture), low_band_by_definition(picture), atol=1e-6, rtol=0)
    expected = picture - low_band_by_definition(picture) + low_band_by_definition(source)
    torch.testing.assert_close(wavelet(picture, source), expected, atol=1e-6, rtol=0)


def test_adain_gives_the_mean_and_deviation_of_the_source() -> None:
    picture, source = pictures()
    fixed = adain(picture, source)
    torch.testing.assert_close(fixed.mean((2, 3)), source.mean((2, 3)), atol=1e-6, rtol=0)
    torch.testing.assert_close(fixed.std((2, 3)), source.std((2, 3)), atol=1e-4, rtol=0)
    deviation = [(x.var((2, 3), keepdim=True) + 1e-5).sqrt() for x in (picture, source)]
    mean = [x.mean((2, 3), keepdim=True) for x in (picture, source)]
    torch.testing.assert_close(fixed, (picture - mean[0]) / deviation[0] * deviation[1] + mean[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["wavelet", "adain"])
def test_a_shift_of_colour_is_taken_back_and_a_constant_picture_gets_the_sources_colour_exactly(kind: str) -> None:
    picture, _ = pictures()
    middle = 0.25 + picture / 2
    shifted = middle + torch.tensor([0.1, -0.05, 0.2])[None, :, None, None]
    torch.testing.assert_close(fix_colours(shifted, middle, kind), middle, atol=2e-6, rtol=0)
    grey, blue = torch.full((1, 3, 40, 40), 0.5), torch.tensor([0.25, 0.5, 0.75])[None, :, None, None].expand(1, 3, 40, 40)
    assert torch.equal(fix_colours(grey, blue, kind), blue)


def test_none_changes_nothing_results_are_clamped_and_mistakes_are_named() -> None:
    picture, source = pictures()
    assert fix_colours(picture, source, "none") is picture
    bright = fix_colours(picture, torch.ones_like(source), "wavelet")
    assert bright.min() >= 0
    assert bright.max() <= 1
    with pytest.raises(ValueError, match="wavelet, adain, none"):
        fix_colours(picture, source, "sepia")
    with pytest.raises(ValueError, match="got a source"):
        fix_colours(picture, source[..., 1:], "adain")
