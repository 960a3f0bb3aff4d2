"""Degradation and augmentation: deterministic, right sizes, and as strong as asked."""

import hashlib

import numpy as np
import pytest

from linearsr.config import AugmentationConfig, DegradationConfig, TagsConfig
from linearsr.degradation import augment, degrade, upsample
from linearsr.tags import encode_tags, vocabulary_of

IMAGE = np.random.default_rng(0).integers(0, 256, (96, 140, 3), dtype=np.uint8)


def test_degrade_is_deterministic_and_divides_the_size() -> None:
    first, second = (degrade(IMAGE, 4, DegradationConfig(), np.random.default_rng(1)) for _ in range(2))
    assert first.shape == (24, 35, 3)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, degrade(IMAGE, 4, DegradationConfig(), np.random.default_rng(2)))


def test_noise_is_as_strong_as_asked() -> None:
    grey = np.full((256, 256, 3), 128, np.uint8)
    config = DegradationConfig(blur_sigma_px=(0, 0), noise_sigma=(10, 10), jpeg_quality=(100, 100))
    noisy = degrade(grey, 4, config, np.random.default_rng(0)).astype(float)
    # JPEG at quality 100 still halves the resolution of colour, so luminance is what can be checked.
    luminance = noisy @ [0.299, 0.587, 0.114]
    assert luminance.std() == pytest.approx(10 * np.linalg.norm([0.299, 0.587, 0.114]), rel=0.1)


def test_degrade_refuses_sides_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="got an image of 140x95 px"):
        degrade(IMAGE[:95], 4, DegradationConfig(), np.random.default_rng(0))


def test_upsample_multiplies_the_size() -> None:
    assert upsample(IMAGE, 4).shape == (384, 560, 3)


@pytest.mark.parametrize("side", [32, 96, 200])
def test_augment_cuts_the_asked_size_also_from_smaller_images(side: int) -> None:
    crop = augment(IMAGE, side, AugmentationConfig(), np.random.default_rng(0))
    assert crop.shape == (side, side, 3)


def test_plain_augmentation_only_cuts() -> None:
    plain = AugmentationConfig(flips=False, scales=(1.0, 1.0), colour=False)
    crop = augment(IMAGE, 96, plain, np.random.default_rng(0))
    assert any(np.array_equal(crop, IMAGE[:, left : left + 96]) for left in range(45))


@pytest.mark.parametrize(("scales", "used"), [((0.5, 0.5), 0.5), ((0.25, 0.3), 1 / 3), ((0.25, 0.5), None)])
def test_a_picture_is_reduced_as_asked_or_as_far_as_its_size_allows(scales: tuple[float, float], used: float | None) -> None:
    """Of a ramp 96 px high, so that 32 px are a third of it at least, and the crop says by its steepness how much it was reduced."""
    ramp = np.repeat(np.arange(96, dtype=np.uint8)[:, None, None], 140, axis=1).repeat(3, axis=2)
    crop = augment(ramp, 32, AugmentationConfig(flips=False, scales=scales, colour=False), np.random.default_rng(0)).astype(float)
    found = 20 / (crop[26, 16, 0] - crop[6, 16, 0])
    assert found == pytest.approx(used, rel=0.06) if used else 1 / 3 <= found <= 0.53


def test_tags_become_ids_and_unknown_ones_are_left_out() -> None:
    config = TagsConfig(vocabulary=vocabulary_of([["Sky ", "cat"], ["cat", "blue  flower"]]), max_tags=3)
    assert config.vocabulary == ("blue flower", "cat", "sky")
    assert encode_tags(["SKY", "dog", "sky", "Blue Flower"], config).tolist() == [3, 1, 0]


def test_the_quickstarts_degradation_is_what_it_was() -> None:
    """80 images by the code as it was before there were other presets: Pillow 13 with its libjpeg-turbo."""
    ramp = np.broadcast_to(np.linspace(0, 255, 128).astype(np.uint8)[:, None, None], (128, 128, 3)).copy()
    image = np.random.default_rng(0).integers(0, 256, (96, 140, 3), dtype=np.uint8)
    configs = (DegradationConfig(), DegradationConfig(blur_sigma_px=(0.2, 1.5), noise_sigma=(1.0, 10.0), jpeg_quality=(60, 95)))
    digest = hashlib.sha256()
    for picture in (image, ramp):
        for seed in range(20):
            for config in configs:
                for scale in (2, 4):
                    digest.update(degrade(picture, scale, config, np.random.default_rng(seed)).tobytes())
    assert digest.hexdigest() == "ffa8ade3ad5b0d4b6d816698b55043bad362020b62e8eb5c385740a70d5a1fa7"
