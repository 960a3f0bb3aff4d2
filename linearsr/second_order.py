"""The second-order degradation: what is drawn for a sample, and what that does to an image. Imports no torch.

All draws come first and do not depend on the image, so that they can be looked at by themselves; the noise of pixels follows from the same
generator. Source: Real-ESRGAN, section 3 and figure 2; the order of operations is its published code's.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from linearsr.blur_kernels import KernelDraw, draw_blur, draw_final_sinc
from linearsr.degradation_config import SecondOrderDegradation
from linearsr.image_filters import RESIZE_MODES, Image, ResizeMode, blur, compress, resize, to_pixels
from linearsr.image_noise import add_gaussian_noise, add_poisson_noise
from linearsr.opencv import opencv

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class RoundDraw:
    """One round of blur, resize and noise."""

    blur: KernelDraw | None
    factor: float
    """Resize factor: of HR in the first round, of LR's size in the second."""
    mode: ResizeMode
    gaussian: bool
    """Gaussian noise, else Poisson."""
    strength: float
    """Standard deviation in levels, or factor on Poisson noise."""
    grey: bool
    """The same noise in all channels."""


@dataclass(frozen=True)
class Plan:
    """All that is drawn for one sample, but the noise of pixels."""

    clean: bool
    """HR is reduced and nothing else happens."""
    first: RoundDraw
    quality: float
    """JPEG quality after the first round."""
    second: RoundDraw | None
    final_sinc: KernelDraw | None
    final_mode: ResizeMode
    """How the image comes to LR's size."""
    final_quality: float
    jpeg_last: bool
    """Second JPEG after the resize to LR's size and the sinc filter, else before them."""


def draw_plan(config: SecondOrderDegradation, rng: np.random.Generator) -> Plan:
    """Draw what happens to a sample."""
    clean = rng.random() < config.no_degradation_prob
    first = _draw_round(config, "", rng, with_blur=True)
    quality = rng.uniform(*config.jpeg_range)
    has_second = rng.random() < config.second_order_prob
    second = _draw_round(config, "2", rng, with_blur=rng.random() < config.second_blur_prob) if has_second else None
    return Plan(
        clean=clean,
        first=first,
        quality=quality,
        second=second,
        final_sinc=draw_final_sinc(config, rng),
        final_mode=_draw_mode(rng),
        final_quality=rng.uniform(*config.jpeg_range2),
        jpeg_last=rng.random() < 0.5,
    )


def carry_out(plan: Plan, hr: Image, scale: int, rng: np.random.Generator) -> Pixels:
    """Make LR, uint8 (H / scale, W / scale, 3), from HR as `plan` has it; both blue first. Draws the noise of pixels from `rng`.

    The image is rounded and clipped to 8 bits where noise is added and before JPEG, where Real-ESRGAN clips it.
    """
    height, width = hr.shape[0] // scale, hr.shape[1] // scale
    if plan.clean:
        return to_pixels(resize(hr, width, height, "area"))
    image = _carry_out_round(plan.first, hr, (hr.shape[0] * plan.first.factor, hr.shape[1] * plan.first.factor), rng)
    image = compress(image, plan.quality)
    if plan.second is not None:
        second = plan.second
        image = _carry_out_round(second, image.astype(np.float32), (height * second.factor, width * second.factor), rng)
    if not plan.jpeg_last:
        image = compress(image, plan.final_quality)
    floats = resize(image.astype(np.float32), width, height, plan.final_mode)
    if plan.final_sinc is not None:
        floats = blur(floats, plan.final_sinc)
    pixels = to_pixels(floats)
    return compress(pixels, plan.final_quality) if plan.jpeg_last else pixels


def degrade_twice(hr: Pixels, scale: int, config: SecondOrderDegradation, rng: np.random.Generator) -> Pixels:
    """Draw a degradation and make LR with it; both uint8 RGB. `hr` is taken as it is: what sharpens it comes before."""
    cv2 = opencv()
    plan = draw_plan(config, rng)
    lr = carry_out(plan, cv2.cvtColor(hr, cv2.COLOR_RGB2BGR).astype(np.float32), scale, rng)
    return cv2.cvtColor(lr, cv2.COLOR_BGR2RGB)  # type: ignore[no-any-return]


def _draw_round(config: SecondOrderDegradation, suffix: str, rng: np.random.Generator, *, with_blur: bool) -> RoundDraw:
    kernel = draw_blur(config, suffix, rng) if with_blur else None
    weights = np.asarray(getattr(config, f"resize_prob{suffix}"))
    low, high = getattr(config, f"resize_range{suffix}")
    factor = (rng.uniform(1, high), rng.uniform(low, 1), 1.0)[rng.choice(3, p=weights / weights.sum())]
    mode = _draw_mode(rng)
    gaussian = rng.random() < getattr(config, f"gaussian_noise_prob{suffix}")
    strength = rng.uniform(*getattr(config, f"{'noise' if gaussian else 'poisson_scale'}_range{suffix}"))
    return RoundDraw(kernel, factor, mode, gaussian, strength, rng.random() < getattr(config, f"gray_noise_prob{suffix}"))


def _draw_mode(rng: np.random.Generator) -> ResizeMode:
    return RESIZE_MODES[int(rng.integers(len(RESIZE_MODES)))]


def _carry_out_round(draw: RoundDraw, image: Image, size: tuple[float, float], rng: np.random.Generator) -> Pixels:
    if draw.blur is not None:
        image = blur(image, draw.blur)
    # A pixel is left of the smallest image.
    image = resize(image, max(1, int(size[1])), max(1, int(size[0])), draw.mode)
    add = add_gaussian_noise if draw.gaussian else add_poisson_noise
    return add(image, draw.strength, grey=draw.grey, rng=rng)
