"""Gaussian and Poisson noise on images, in colour or grey, by tables of quantiles. Imports no torch.

A random 16-bit number looks a value up in a table of equally likely ones: an eighth of the time that numpy's generators take for the same
distribution. Images are float32 (H, W, 3), blue first, 0 to 255; results are uint8, rounded and clipped.
"""

from functools import lru_cache
from math import ceil, lgamma, log2
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from linearsr.opencv import opencv

Image = NDArray[np.float32]
Pixels = NDArray[np.uint8]

_NORMAL_BITS, _POISSON_BITS = 16, 12
"""Sizes of the tables: 2^16 values of one distribution, and 2^12 of 256, as many as fit the cache."""


def add_gaussian_noise(image: Image, sigma: float, *, grey: bool, rng: np.random.Generator) -> Pixels:
    """Add normal noise of standard deviation `sigma` levels, the same in all channels if `grey`."""
    noise = normal_quantiles().take(_random_bits(image.shape[:2] if grey else image.shape, rng))
    return _add(image, noise, sigma)


def add_poisson_noise(image: Image, scale: float, *, grey: bool, rng: np.random.Generator) -> Pixels:
    """Add `scale` times the noise of counting photons.

    A level v counts Poisson(v / 255 n) photons, with n the number of different levels in the image, rounded up to a power of two; if
    `grey`, the noise is that of the image's luminance in all channels. Source: Real-ESRGAN, section 3.2, and basicsr/data/degradations.py
    for n, which is scikit-image's.
    """
    cv2 = opencv()
    counted = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) if grey else image
    levels = cv2.add(counted, 0.0, dtype=cv2.CV_8U)
    histogram = cv2.calcHist([levels.reshape(-1, 1)], [0], None, [256], [0, 256])
    table = poisson_noise_quantiles(2 ** ceil(log2(np.count_nonzero(histogram))))
    index = levels.astype(np.int32) << _POISSON_BITS
    index |= _random_bits(levels.shape, rng) >> (16 - _POISSON_BITS)
    return _add(image, table.take(index), scale)


@lru_cache(maxsize=1)
def normal_quantiles() -> NDArray[np.float32]:
    """Return 2^16 equally likely values (65536,) of the standard normal distribution, ascending."""
    count = 2**_NORMAL_BITS
    normal = NormalDist()
    upper = np.array([normal.inv_cdf(0.5 + (i + 0.5) / count) for i in range(count // 2)], dtype=np.float32)
    return _read_only(np.concatenate([-upper[::-1], upper]))


@lru_cache(maxsize=9)
def poisson_noise_quantiles(photons: int) -> NDArray[np.float32]:
    """Return 2^12 equally likely errors of each level, flat (256 * 4096,): level v by counting Poisson(v / 255 photons) photons.

    Args:
        photons: how many white counts on average, a power of two up to 256.
    """
    mean = np.arange(256)[:, None] * (photons / 255)
    # Twelve deviations past the largest mean, and some for small ones.
    count = np.arange(ceil(photons + 12 * photons**0.5) + 12)
    log_factorial = np.array([lgamma(k + 1) for k in count])
    with np.errstate(divide="ignore", invalid="ignore"):
        below = np.cumsum(np.exp(count * np.log(mean) - mean - log_factorial), axis=1)
    below[0] = 1
    likely = (np.arange(2**_POISSON_BITS) + 0.5) / 2**_POISSON_BITS
    photons_seen = np.stack([np.searchsorted(row, likely) for row in below])
    errors = photons_seen * (255 / photons) - np.arange(256)[:, None]
    return _read_only(errors.astype(np.float32).ravel())


def _add(image: Image, noise: Image, strength: float) -> Pixels:
    cv2 = opencv()
    if noise.ndim == 2:
        noise = cv2.merge([noise, noise, noise])
    return cv2.addWeighted(image, 1, noise, strength, 0, dtype=cv2.CV_8U)  # type: ignore[no-any-return]


def _random_bits(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.uint16]:
    """Return random 16-bit numbers, four from each draw of the generator."""
    count = int(np.prod(shape))
    return rng.integers(0, 2**64, -(-count // 4), dtype=np.uint64).view(np.uint16)[:count].reshape(shape)


def _read_only(table: NDArray[np.float32]) -> NDArray[np.float32]:
    table.flags.writeable = False
    return table
