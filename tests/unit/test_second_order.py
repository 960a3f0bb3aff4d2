"""The second-order degradation: what is drawn, what each operation does, and that a sample's LR depends on its generator alone."""

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import pi

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage, special, stats

from linearsr.blur_kernels import KernelDraw, bessel_j1, kernel_of, profile_of
from linearsr.config import DegradationConfig
from linearsr.degradation import degrade, degrade_pair
from linearsr.degradation_config import PRESETS, InvSrDegradation, RealEsrganDegradation, SecondOrderDegradation, StableSrDegradation
from linearsr.image_filters import blur, compress, resize, sharpen_pixels
from linearsr.image_noise import add_gaussian_noise, add_poisson_noise, normal_quantiles, poisson_noise_quantiles
from linearsr.opencv import DegradationError
from linearsr.second_order import Plan, carry_out, draw_plan

SECOND_ORDER = {name: preset for name, preset in PRESETS.items() if issubclass(preset, SecondOrderDegradation)}
DRAWS = 6000
# Edges, a ramp and texture: 96 x 128 px.
IMAGE = np.clip(
    np.add.outer(np.linspace(0, 120, 96), 60 * (np.arange(128) // 16 % 2))[..., None]
    + np.random.default_rng(5).normal(40, 12, (96, 128, 3)),
    0,
    255,
).astype(np.uint8)


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    rng = np.random.default_rng(0)
    return [draw_plan(RealEsrganDegradation(), rng) for _ in range(DRAWS)]


def assert_uniform(values: list[float], low: float, high: float) -> None:
    assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3


def assert_shares(values: list[object], shares: dict[object, float]) -> None:
    counts = Counter(values)
    assert set(counts) <= set(shares)
    observed = np.array([counts[key] for key in shares])
    assert stats.chisquare(observed, observed.sum() * np.array([*shares.values()])).pvalue > 1e-3


@pytest.mark.parametrize("second", [False, True])
def test_rounds_are_drawn_as_published(plans: list[Plan], second: bool) -> None:
    rounds = [plan.second if second else plan.first for plan in plans]
    up, down, keep = (0.3, 0.4, 0.3) if second else (0.2, 0.7, 0.1)
    low, high = (0.3, 1.2) if second else (0.15, 1.5)
    assert_shares([int(np.sign(one.factor - 1)) for one in rounds], {1: up, -1: down, 0: keep})
    assert_uniform([one.factor for one in rounds if one.factor < 1], low, 1)
    assert_uniform([one.factor for one in rounds if one.factor > 1], 1, high)
    assert_shares([one.mode for one in rounds], dict.fromkeys(("area", "bilinear", "bicubic"), 1 / 3))
    assert_shares([one.gaussian for one in rounds], {True: 0.5, False: 0.5})
    assert_shares([one.grey for one in rounds], {True: 0.4, False: 0.6})
    assert_uniform([one.strength for one in rounds if one.gaussian], 1, 25 if second else 30)
    assert_uniform([one.strength for one in rounds if not one.gaussian], 0.05, 2.5 if second else 3)
    blurred = [one.blur is not None for one in rounds]
    assert all(blurred) if not second else stats.binomtest(sum(blurred), DRAWS, 0.8).pvalue > 1e-3


@pytest.mark.parametrize("second", [False, True])
def test_kernels_are_drawn_as_published(plans: list[Plan], second: bool) -> None:
    draws = [one.blur for plan in plans if (one := plan.second if second else plan.first).blur is not None]
    shares = {"iso": 0.45, "aniso": 0.25, "generalized_iso": 0.12, "generalized_aniso": 0.03, "plateau_iso": 0.12, "plateau_aniso": 0.03}
    assert_shares([draw.kind for draw in draws], {**{kind: 0.9 * share for kind, share in shares.items()}, "sinc": 0.1})
    assert_shares([draw.side for draw in draws], dict.fromkeys(range(7, 22, 2), 1 / 8))
    sigma = (0.2, 1.5 if second else 3.0)
    blurs = [draw for draw in draws if draw.kind != "sinc"]
    turned = [draw for draw in blurs if draw.kind.endswith("aniso")]
    assert all(draw.sigma[0] == draw.sigma[1] for draw in blurs if draw not in turned)
    assert_uniform([draw.sigma[0] for draw in blurs], *sigma)
    assert_uniform([draw.sigma[1] for draw in turned], *sigma)
    assert_uniform([draw.angle for draw in turned], -pi, pi)
    for family, low, high in (("generalized", 0.5, 4.0), ("plateau", 1.0, 2.0)):
        betas = [draw.beta for draw in blurs if draw.kind.startswith(family)]
        assert_shares([beta > 1 for beta in betas], {True: 0.5, False: 0.5})
        assert_uniform([beta for beta in betas if beta > 1], 1, high)
        assert all(low <= beta <= 1 for beta in betas if beta <= 1)
    sinc = [draw for draw in draws if draw.kind == "sinc"]
    assert_uniform([draw.cutoff for draw in sinc if draw.side < 13], pi / 3, pi)
    assert_uniform([draw.cutoff for draw in sinc if draw.side >= 13], pi / 5, pi)
    assert min(draw.cutoff for draw in sinc if draw.side == 13) < pi / 3


def test_the_end_is_drawn_as_published(plans: list[Plan]) -> None:
    assert_uniform([plan.quality for plan in plans], 30, 95)
    assert_uniform([plan.final_quality for plan in plans], 30, 95)
    assert_shares([plan.jpeg_last for plan in plans], {True: 0.5, False: 0.5})
    assert_shares([plan.final_mode for plan in plans], dict.fromkeys(("area", "bilinear", "bicubic"), 1 / 3))
    assert_shares([plan.final_sinc is not None for plan in plans], {True: 0.8, False: 0.2})
    assert_uniform([plan.final_sinc.cutoff for plan in plans if plan.final_sinc is not None], pi / 3, pi)
    assert not any(plan.clean for plan in plans)


def test_invsr_and_stablesr_draw_what_is_theirs() -> None:
    rng = np.random.default_rng(1)
    invsr = [draw_plan(InvSrDegradation(), rng) for _ in range(2000)]
    assert_shares([plan.second is not None for plan in invsr], {True: 0.5, False: 0.5})
    assert_shares([plan.first.blur.side for plan in invsr], dict.fromkeys(range(3, 20, 2), 1 / 9))
    stablesr = [draw_plan(StableSrDegradation(), rng) for _ in range(DRAWS)]
    assert_shares([plan.clean for plan in stablesr], {True: 0.01, False: 0.99})
    assert_uniform([plan.final_quality for plan in stablesr], 60, 100)


def plain_kernel(draw: KernelDraw) -> np.ndarray:
    """Real-ESRGAN's section 3.1 and equation 6, pixel by pixel."""
    half = draw.side // 2
    turn = np.array([[np.cos(draw.angle), -np.sin(draw.angle)], [np.sin(draw.angle), np.cos(draw.angle)]])
    kernel = np.zeros((draw.side, draw.side))
    inverse = None if draw.kind == "sinc" else np.linalg.inv(turn @ np.diag(np.square(draw.sigma)) @ turn.T)
    for i in range(draw.side):
        for j in range(draw.side):
            place = np.array([j - half, i - half])
            if inverse is None:
                radius = np.hypot(*place)
                kernel[i, j] = draw.cutoff * special.j1(draw.cutoff * radius) / (2 * pi * radius) if radius else draw.cutoff**2 / (4 * pi)
            elif draw.kind.startswith("plateau"):
                kernel[i, j] = 1 / (1 + (place @ inverse @ place) ** draw.beta)
            else:
                kernel[i, j] = np.exp(-0.5 * (place @ inverse @ place) ** draw.beta)
    return kernel / kernel.sum()


KERNELS = [
    KernelDraw("iso", 21, (2.5, 2.5)),
    KernelDraw("iso", 7, (3.0, 3.0)),
    KernelDraw("iso", 21, (0.2, 0.2)),
    KernelDraw("aniso", 21, (2.9, 0.7), angle=0.6),
    KernelDraw("aniso", 13, (0.3, 0.4), angle=-2.0),
    KernelDraw("generalized_iso", 17, (1.5, 1.5), beta=0.5),
    KernelDraw("generalized_aniso", 21, (3.0, 1.0), angle=2.0, beta=3.5),
    KernelDraw("plateau_iso", 21, (2.0, 2.0), beta=1.0),
    KernelDraw("plateau_aniso", 15, (2.0, 0.5), angle=-1.0, beta=1.9),
    KernelDraw("sinc", 7, cutoff=1.1),
    KernelDraw("sinc", 21, cutoff=0.7),
    KernelDraw("sinc", 21, cutoff=3.1),
]


@pytest.mark.parametrize("draw", KERNELS, ids=str)
def test_a_kernel_is_its_formula_but_for_rings_without_weight(draw: KernelDraw) -> None:
    plain, kernel = plain_kernel(draw), kernel_of(draw)
    cut = (draw.side - kernel.shape[0]) // 2
    assert np.abs(np.pad(kernel.astype(float), cut) - plain).sum() < 5e-4
    profile = profile_of(draw)
    assert (profile is not None) == (draw.kind == "iso")
    if profile is not None:
        whole = np.pad(np.outer(profile, profile), (draw.side - len(profile)) // 2)
        assert np.abs(whole - plain).sum() < 5e-4


def test_bessel_is_bessel() -> None:
    x = np.linspace(0, 120, 1001)
    assert np.abs(bessel_j1(x) - special.j1(x)).max() < 1e-13


@pytest.mark.parametrize("draw", KERNELS, ids=str)
def test_blur_is_a_plain_convolution_with_mirrored_edges(draw: KernelDraw) -> None:
    image = IMAGE.astype(np.float32)
    plain = np.stack([ndimage.correlate(image[..., c].astype(float), plain_kernel(draw), mode="mirror") for c in range(3)], axis=-1)
    assert np.abs(blur(image, draw) - plain).max() < 0.06


@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(48, 64), (33, 51), (150, 200), (96, 40)])
def test_resize_is_torchs(mode: str, size: tuple[int, int]) -> None:
    image = IMAGE.astype(np.float32)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(planes, size=size, mode=mode)[0].permute(1, 2, 0).numpy()
    assert np.abs(resize(image, size[1], size[0], mode) - expected).max() < 0.01


def test_gaussian_noise_is_normal_and_as_strong_as_asked() -> None:
    flat = np.full((200, 300, 3), 128, np.float32)
    noise = add_gaussian_noise(flat, 20.0, grey=False, rng=np.random.default_rng(0)).astype(float) - 128
    # Rounded to levels, the noise is normal with a variance larger by 1/12.
    unrounded = noise + np.random.default_rng(1).uniform(-0.5, 0.5, noise.shape)
    assert stats.kstest(unrounded.ravel()[::7], stats.norm(0, 20).cdf).pvalue > 1e-3
    assert noise.std() == pytest.approx(20, rel=0.01)
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.02
    assert stats.kstest(normal_quantiles(), stats.norm.cdf).statistic < 1e-5


@pytest.mark.parametrize("grey", [False, True])
def test_poisson_noise_has_the_variance_of_photons(grey: bool) -> None:
    """Variance is scale^2 * level * 255 / photons, and photons the number of different levels, 8 here."""
    levels = np.repeat(np.linspace(60, 130, 8).round(), 20000).astype(np.float32)
    image = np.repeat(levels.reshape(-1, 100, 1), 3, axis=2)
    noise = add_poisson_noise(image, 0.4, grey=grey, rng=np.random.default_rng(0)).astype(float) - image
    for level in np.unique(levels):
        seen = noise[image == level]
        assert seen.var() == pytest.approx(0.4**2 * level * 255 / 8 + 1 / 12, rel=0.05)
        assert seen.mean() == pytest.approx(0, abs=0.5)
    alike = (noise == noise[..., :1]).all(axis=-1).mean()
    assert alike == 1 if grey else alike < 0.5


@pytest.mark.parametrize("photons", [1, 16, 256])
def test_the_poisson_table_is_poisson(photons: int) -> None:
    table = poisson_noise_quantiles(photons).reshape(256, -1).astype(float)
    for level in (0, 1, 17, 128, 255):
        counts = np.rint((table[level] + level) * photons / 255)
        expected = stats.poisson(level * photons / 255)
        k = np.arange(counts.max() + 2)
        assert np.abs((counts[None] <= k[:, None]).mean(axis=1) - expected.cdf(k)).max() < 2 / 4096


def test_grey_noise_is_the_same_in_all_channels() -> None:
    image = np.full((64, 64, 3), 100, np.float32)
    noisy = add_gaussian_noise(image, 15.0, grey=True, rng=np.random.default_rng(0))
    assert (noisy == noisy[..., :1]).all()
    assert noisy.std() > 10


def test_jpeg_is_worse_at_lower_quality_and_knows_which_channel_is_blue() -> None:
    errors = [np.square(compress(IMAGE, quality).astype(float) - IMAGE).mean() for quality in (10, 30, 60.4, 95, 100)]
    assert errors == sorted(errors, reverse=True)
    assert np.array_equal(compress(IMAGE, 60.4), compress(IMAGE, 60))
    # Luminance weighs red more than blue and keeps more of it: blue first.
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    lost = np.square(compress(noise, 90).astype(float) - noise).mean(axis=(0, 1))
    assert lost[1] < lost[2] < lost[0]


def test_sharpening_is_unsharp_masking() -> None:
    x = np.arange(51) - 25
    profile = np.exp(-(x**2) / (2 * 8.0**2))
    profile /= profile.sum()

    def wide(image: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            image = ndimage.correlate1d(image, profile, axis=axis, mode="mirror")
        return image

    image = cv2.resize(IMAGE, (256, 192), interpolation=cv2.INTER_CUBIC)
    exact = image.astype(float)
    residual = exact - wide(exact)
    soft = wide((np.abs(residual) > 10).astype(float))
    exact += soft * (np.clip(exact + 0.5 * residual, 0, 255) - exact)
    error = sharpen_pixels(image) - exact
    assert np.sqrt(np.square(error).mean()) < 0.4
    assert np.sqrt(np.square(image - exact).mean()) > 5


def test_plans_decide_the_order_of_jpeg_and_sinc() -> None:
    rng = np.random.default_rng(0)
    plan = replace(draw_plan(RealEsrganDegradation(), rng), final_quality=30.0, final_sinc=KernelDraw("sinc", 21, cutoff=1.1))
    last, before = (
        carry_out(replace(plan, jpeg_last=jpeg_last), IMAGE.astype(np.float32), 4, np.random.default_rng(3)) for jpeg_last in (True, False)
    )
    assert not np.array_equal(last, before)
    # What a sinc filter leaves above its cut-off is nothing, what JPEG adds there is something.
    assert high_frequencies(before) < 0.3 * high_frequencies(last)


def high_frequencies(image: np.ndarray) -> float:
    luma = image.astype(float).mean(axis=-1)
    power = np.abs(np.fft.fft2(luma * np.outer(np.hanning(luma.shape[0]), np.hanning(luma.shape[1])))) ** 2
    y, x = (np.abs(np.fft.fftfreq(side)) for side in luma.shape)
    return float(power[np.hypot.outer(y, x) > 0.32].sum())


def test_a_clean_plan_only_reduces() -> None:
    lr = degrade(IMAGE, 4, StableSrDegradation(no_degradation_prob=1.0, gt_usm=False), np.random.default_rng(0))
    mean = IMAGE.reshape(24, 4, 32, 4, 3).mean(axis=(1, 3))
    assert np.abs(lr - mean).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_lr_depends_on_the_generator_alone(name: str) -> None:
    """Not on what was degraded before, nor on threads beside it: the reader seeds a generator by seed, sample, epoch and draw."""
    config = SECOND_ORDER[name]()

    def lr(seed: int) -> bytes:
        image = degrade(IMAGE, 4, config, np.random.default_rng([3, seed]))
        assert (image.shape, image.dtype) == ((24, 32, 3), np.uint8)
        return image.tobytes()

    alone = [lr(seed) for seed in range(16)]
    assert len(set(alone)) == 16
    assert [lr(seed) for seed in reversed(range(16))][::-1] == alone
    cv2.setRNGSeed(7)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lr, range(16))) == alone


@pytest.mark.parametrize("side", [8, 20])
@pytest.mark.parametrize("name", SECOND_ORDER)
def test_the_smallest_crops_are_degraded_too(name: str, side: int) -> None:
    for seed in range(40):
        crop = IMAGE[:side, :side]
        assert degrade(crop, 4, SECOND_ORDER[name](), np.random.default_rng(seed)).shape == (side // 4, side // 4, 3)


def test_the_target_is_sharpened_where_the_files_say_so() -> None:
    def pair(**keys: bool) -> tuple[np.ndarray, np.ndarray]:
        return degrade_pair(IMAGE, 4, RealEsrganDegradation(**keys), np.random.default_rng(0))

    sharp = sharpen_pixels(IMAGE)
    (both, lr), (plain, same_lr), (neither, other_lr) = pair(), pair(l1_gt_usm=False), pair(gt_usm=False)
    assert np.array_equal(both, sharp)
    assert np.array_equal(plain, IMAGE)
    assert np.array_equal(neither, IMAGE)
    assert np.array_equal(lr, same_lr)
    assert not np.array_equal(lr, other_lr)
    assert np.array_equal(lr, degrade_pair(sharp, 4, RealEsrganDegradation(gt_usm=False), np.random.default_rng(0))[1])


def test_the_extra_is_named_where_opencv_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(DegradationError, match=r'expected OpenCV; fix: pip install "linearsr\[platform\]"'):
        degrade(IMAGE, 4, RealEsrganDegradation(), np.random.default_rng(0))
    assert degrade(IMAGE, 4, DegradationConfig(), np.random.default_rng(0)).shape == (24, 32, 3)
