"""From HR photographs to training pairs: augmentation, and synthesis of the LR image. Imports no torch.

Images are uint8 (H, W, 3) RGB. Everything random comes from the generator that is passed in.
"""

from io import BytesIO
from math import exp, log

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from linearsr.config import AugmentationConfig, DegradationConfig
from linearsr.degradation_config import Degradation, SecondOrderDegradation

Pixels = NDArray[np.uint8]


def upsample(lr: Pixels, scale: int) -> Pixels:
    """Enlarge (h, w, 3) `scale` times by bicubic interpolation: the baseline that every model is compared with."""
    height, width = lr.shape[:2]
    return np.asarray(Image.fromarray(lr).resize((width * scale, height * scale), Image.Resampling.BICUBIC))


def degrade(hr: Pixels, scale: int, config: Degradation, rng: np.random.Generator) -> Pixels:
    """Synthesise LR (H / scale, W / scale, 3) from HR (H, W, 3), sharpened first where `config` says so.

    Raises:
        ValueError: if the sides of `hr` are not multiples of `scale`.
        DegradationError: if the degradation needs OpenCV and it is not installed.
    """
    return degrade_pair(hr, scale, config, rng)[1]


def degrade_pair(hr: Pixels, scale: int, config: Degradation, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """Synthesise LR as `degrade`, and return what training aims at with it: HR, sharpened where `config` says so, and LR.

    Raises:
        ValueError, DegradationError: as `degrade`.
    """
    height, width = hr.shape[:2]
    if height % scale or width % scale:
        raise ValueError(f"degrade: got an image of {width}x{height} px; expected sides that are multiples of {scale}; fix: crop it first")
    if not isinstance(config, SecondOrderDegradation):
        return hr, _degrade_once(hr, scale, config, rng)
    # Here, so that the first order does without OpenCV.
    from linearsr.image_filters import sharpen_pixels
    from linearsr.second_order import degrade_twice

    sharp = sharpen_pixels(hr) if config.gt_usm else hr
    return (sharp if config.sharpens_target else hr), degrade_twice(sharp, scale, config, rng)


def _degrade_once(hr: Pixels, scale: int, config: DegradationConfig, rng: np.random.Generator) -> Pixels:
    """Gaussian blur, bicubic reduction, Gaussian noise, JPEG."""
    height, width = hr.shape[:2]
    sigma_px, noise_sigma = rng.uniform(*config.blur_sigma_px), rng.uniform(*config.noise_sigma)
    quality = int(rng.integers(config.jpeg_quality[0], config.jpeg_quality[1], endpoint=True))
    blurred = Image.fromarray(hr).filter(ImageFilter.GaussianBlur(sigma_px))
    small = np.asarray(blurred.resize((width // scale, height // scale), Image.Resampling.BICUBIC), dtype=np.float32)
    noisy = small + noise_sigma * rng.standard_normal(small.shape, dtype=np.float32)
    buffer = BytesIO()
    Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def augment(image: Pixels, crop_px: int, config: AugmentationConfig, rng: np.random.Generator) -> Pixels:
    """Cut a random crop (crop_px, crop_px, 3), with random scale, pose and colour as `config` allows.

    An image smaller than the crop is mirrored at its edges first.
    """
    height, width = image.shape[:2]
    if min(height, width) < crop_px:
        pad = [(0, max(0, crop_px - side)) for side in (height, width)]
        image = np.pad(image, [*pad, (0, 0)], mode="symmetric")
        height, width = image.shape[:2]
    smallest = max(config.scales[0], crop_px / min(height, width))
    scale = exp(rng.uniform(log(smallest), log(config.scales[1]))) if smallest < config.scales[1] else smallest
    size = min(round(crop_px / scale), height, width)
    top, left = rng.integers(0, height - size, endpoint=True), rng.integers(0, width - size, endpoint=True)
    crop = image[top : top + size, left : left + size]
    if size != crop_px:
        crop = np.asarray(Image.fromarray(crop).resize((crop_px, crop_px), Image.Resampling.LANCZOS))
    if config.flips:
        crop = np.rot90(crop, int(rng.integers(4)))
        crop = crop[:, ::-1] if rng.random() < 0.5 else crop
    return recolour(crop, rng) if config.colour else np.ascontiguousarray(crop)


def recolour(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Permute channels and change gain and gamma at random, the same for every pixel."""
    gain, gamma = rng.uniform(0.7, 1.2), exp(rng.uniform(-0.3, 0.3))
    curve = 255 * np.clip(gain * np.linspace(0, 1, 256) ** gamma, 0, 1)
    table = np.rint(curve).astype(np.uint8)
    return np.ascontiguousarray(table[image][..., rng.permutation(3)])
