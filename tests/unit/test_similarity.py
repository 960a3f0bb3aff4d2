"""PSNR, SSIM and MS-SSIM of our own: equal to pyiqa's and to float64 wherever float32 could lose something."""

import numpy as np
import pytest
import skimage.data
import torch
from skimage.filters import gaussian
from skimage.metrics import structural_similarity

from linearsr.similarity import ms_ssim, psnr_y, ssim_y

PHOTOS = {"astronaut": (60, 60, 256, 256), "coffee": (80, 120, 233, 257), "chelsea": (30, 60, 256, 199)}


def photo(name):
    top, left, height, width = PHOTOS[name]
    return getattr(skimage.data, name)()[top : top + height, left : left + width] / 255


def damaged(image, how):
    rng = np.random.default_rng(0)
    changed = {
        "noise": lambda: image + 0.05 * rng.standard_normal(image.shape),
        "blur": lambda: gaussian(image, 1.5, channel_axis=2),
        "dark": lambda: 0.7 * image,
        "one level": lambda: image + rng.integers(-1, 2, image.shape) / 255,
    }[how]()
    return np.round(changed.clip(0, 1) * 255) / 255


def tensor(image):
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None].float()


def luma(image):
    """Y of BT.601 in studio range, from the standard, (H, W) float64."""
    return 16 + image @ np.array([65.481, 128.553, 24.966])


def reference_psnr(x, y):
    return 10 * np.log10(255**2 / np.mean((luma(x) - luma(y)) ** 2))


def reference_ssim(x, y):
    options = {"data_range": 255, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return structural_similarity(luma(x), luma(y), **options)


@pytest.mark.parametrize("how", ["noise", "blur", "dark", "one level"])
@pytest.mark.parametrize("name", PHOTOS)
def test_values_are_those_of_pyiqa_and_of_float64(name, how):
    pyiqa = pytest.importorskip("pyiqa")
    from pyiqa.archs.ssim_arch import ssim

    hr = photo(name)
    sr = damaged(hr, how)
    x, y = tensor(sr), tensor(hr)
    assert psnr_y(x, y).item() == pytest.approx(reference_psnr(sr, hr), abs=1e-5)
    assert ssim_y(x, y).item() == pytest.approx(reference_ssim(sr, hr), abs=1e-6)
    # Of one channel pyiqa takes what it is given; of three it would round Y to whole levels first, which moves SSIM by up to 1e-3.
    planes = (torch.from_numpy(luma(image))[None, None] for image in (sr, hr))
    assert ssim_y(x, y).item() == pytest.approx(ssim(*planes, data_range=255).item(), abs=1e-5)
    theirs = pyiqa.create_metric("ms_ssim", device=torch.device("cpu"))
    assert ms_ssim(x, y).item() == pytest.approx(theirs(x, y).item(), abs=1e-5)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_flat_images_with_faint_noise_lose_nothing_to_float32(level):
    rng = np.random.default_rng(0)
    x, y = (np.clip(level + rng.integers(-1, 2, (96, 96, 3)) / 255, 0, 1) for _ in range(2))
    assert ssim_y(tensor(x), tensor(y)).item() == pytest.approx(reference_ssim(x, y), abs=2e-6)
    assert psnr_y(tensor(x), tensor(y)).item() == pytest.approx(reference_psnr(x, y), abs=1e-5)


def test_every_image_of_a_batch_is_measured_by_itself_and_identical_ones_are_perfect():
    hr = tensor(photo("astronaut")).expand(3, -1, -1, -1)
    sr = hr.clone()
    sr[1], sr[2] = tensor(damaged(photo("astronaut"), "noise"))[0], tensor(damaged(photo("astronaut"), "dark"))[0]
    for measure, perfect in ((psnr_y, 100), (ssim_y, 1), (ms_ssim, 1)):
        together = measure(sr, hr)
        assert together.shape == (3,)
        assert together.dtype == torch.float64
        assert together[0].item() == pytest.approx(perfect, abs=1e-12)
        assert together[1:].tolist() == pytest.approx([measure(sr[i : i + 1], hr[i : i + 1]).item() for i in (1, 2)], abs=1e-6)
