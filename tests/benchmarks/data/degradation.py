"""What the second-order degradation costs against Real-ESRGAN's own code on the CPU, and whether both make the same kind of images.

Run: `OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 python tests/benchmarks/data/degradation.py --peer DIR`, where DIR holds both packages of the
reference: `pip install --no-deps --target DIR basicsr==1.4.2 realesrgan==0.3.0`; SciPy, torchvision, scikit-image and OpenCV come from the
environment, as do addict, lmdb, PyYAML, tqdm and requests if they are asked for.

Both sides get the same photographs, 512 x 512 px to 128 x 128 px, in batches of four, in turns in one process on one thread, by CPU time:
the reference as its `RealESRNetModel.feed_data` runs, with kernels drawn by basicsr, but no dataset, pool or GPU. Then each side degrades
the same photographs one by one, and the means, variances, gradients and high frequencies of the LR images are compared by Kolmogorov and
Smirnov's test. Exits with 1 if a ratio is under `--least` or `--least-usm`, or a distribution differs with p under `--alpha`.
"""

import argparse
import random
import sys
import types
from collections.abc import Callable
from math import pi
from pathlib import Path
from statistics import mean, median
from time import process_time
from typing import Any

import cv2
import numpy as np
import skimage.data
import torch
from numpy.typing import NDArray
from scipy.stats import ks_2samp

from linearsr.degradation import degrade
from linearsr.degradation_config import RealEsrganDegradation

Pixels = NDArray[np.uint8]
Side = Callable[[list[Pixels]], list[Pixels]]
SIDE_PX, SCALE, BATCH = 512, 4, 4
MEASURES = ("mean", "variance", "gradient energy", "high frequencies")


def photographs() -> list[Pixels]:
    """Eight photographs of 512 x 512 px; smaller ones are enlarged first."""
    names = ("astronaut", "coffee", "rocket", "chelsea", "hubble_deep_field", "immunohistochemistry", "retina")
    found = []
    for photo in (*(getattr(skimage.data, name)() for name in names), skimage.data.stereo_motorcycle()[0]):
        factor = max(1.0, SIDE_PX / min(photo.shape[:2]))
        if factor > 1:
            photo = cv2.resize(photo, None, fx=factor, fy=factor, interpolation=cv2.INTER_LANCZOS4)  # noqa: PLW2901
        top, left = ((side - SIDE_PX) // 2 for side in photo.shape[:2])
        found.append(np.ascontiguousarray(photo[top : top + SIDE_PX, left : left + SIDE_PX]))
    return found


class Reference:
    """Real-ESRGAN's degradation as its training runs it, on the CPU."""

    def __init__(self, folder: Path, config: RealEsrganDegradation) -> None:
        """Import it from `folder`, which two things of today keep from working as it is."""
        # Appended: its own dependencies must not come before the environment's.
        sys.path.append(str(folder))
        gone = types.ModuleType("torchvision.transforms.functional_tensor")
        gone.rgb_to_grayscale = __import__("torchvision.transforms.functional", fromlist=["x"]).rgb_to_grayscale  # type: ignore[attr-defined]
        sys.modules[gone.__name__] = gone
        from basicsr.data.degradations import circular_lowpass_kernel, random_mixed_kernels
        from basicsr.utils import DiffJPEG, USMSharp, diffjpeg
        from realesrgan.models import realesrnet_model

        # Both take a `view` of what the CPU's average pooling and interpolation leave with channels last, and CUDA's do not.
        split, filter2d = diffjpeg.BlockSplitting.forward, realesrnet_model.filter2D
        diffjpeg.BlockSplitting.forward = lambda block, image: split(block, image.contiguous())
        realesrnet_model.filter2D = lambda image, kernel: filter2d(image.contiguous(), kernel)
        self._sinc, self._mixed, self._config = circular_lowpass_kernel, random_mixed_kernels, config
        model: Any = type("Model", (), {"feed_data": realesrnet_model.RealESRNetModel.feed_data, "_dequeue_and_enqueue": lambda _: None})()
        model.device, model.is_train = torch.device("cpu"), True
        model.jpeger, model.usm_sharpener = DiffJPEG(differentiable=False), USMSharp()
        names = [f"{name}{suffix}" for name in _MODEL_KEYS for suffix in ("", "2")]
        model.opt = {name: getattr(config, name) for name in names} | {
            "scale": SCALE, "gt_size": SIDE_PX, "gt_usm": config.gt_usm, "second_blur_prob": config.second_blur_prob
        }  # fmt: skip
        self._model = model

    def __call__(self, images: list[Pixels]) -> list[Pixels]:
        """Degrade a batch; what its code shares within a batch is shared."""
        kernels = [self._kernels() for _ in images]
        names = ("kernel1", "kernel2", "sinc_kernel")
        data = {name: torch.from_numpy(np.stack([one[i] for one in kernels])).float() for i, name in enumerate(names)}
        data["gt"] = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().float() / 255
        self._model.feed_data(data)
        lr = self._model.lq.mul(255).round().byte().permute(0, 2, 3, 1)
        return [np.ascontiguousarray(image) for image in lr.numpy()]

    def _kernels(self) -> tuple[NDArray[np.float64], ...]:
        """Draw three kernels, padded to 21, as `RealESRGANDataset` does."""
        config, drawn, uniform = self._config, [], np.random.uniform
        for suffix in ("", "2"):
            side = random.choice(range(7, 22, 2))
            if uniform() < getattr(config, f"sinc_prob{suffix}"):
                kernel = self._sinc(uniform(pi / 3 if side < 13 else pi / 5, pi), side, pad_to=False)
            else:
                names = ("kernel_list", "kernel_prob", "blur_sigma", "betag_range", "betap_range")
                kinds, weights, sigma, generalised, plateau = (getattr(config, f"{name}{suffix}") for name in names)
                kernel = self._mixed(kinds, weights, side, sigma, sigma, [-pi, pi], generalised, plateau, noise_range=None)
            drawn.append(np.pad(kernel, (21 - side) // 2))
        pulse = np.zeros((21, 21))
        pulse[10, 10] = 1
        if uniform() < config.final_sinc_prob:
            pulse = self._sinc(uniform(pi / 3, pi), random.choice(range(7, 22, 2)), pad_to=21)
        return (*drawn, pulse)


_MODEL_KEYS = (
    "resize_prob", "resize_range", "gaussian_noise_prob", "noise_range", "poisson_scale_range", "gray_noise_prob", "jpeg_range",
)  # fmt: skip


def ours(config: RealEsrganDegradation, rng: np.random.Generator) -> Side:
    """Return our side of the comparison."""
    return lambda images: [degrade(image, SCALE, config, rng) for image in images]


def race(sides: tuple[Side, Side], batches: int, label: str) -> tuple[float, float]:
    """Time both sides in turns, print a row, and return the ratios of medians and of means, reference over ours."""
    photos = photographs()
    spent: tuple[list[float], list[float]] = ([], [])
    for side in sides:
        side(photos[:BATCH])
    for number in range(batches):
        batch = [photos[(number * BATCH + i) % len(photos)] for i in range(BATCH)]
        for index in (0, 1) if number % 2 else (1, 0):
            started = process_time()
            sides[index](batch)
            spent[index].append((process_time() - started) / BATCH * 1e3)
    ratios = median(spent[1]) / median(spent[0]), mean(spent[1]) / mean(spent[0])
    row = [f"{value:9.2f}" for times in spent for value in (median(times), mean(times))]
    rate = 1e3 / mean(spent[0])
    print(f"{label:<12} {' '.join(row)} {ratios[0]:7.1f} {ratios[1]:7.1f} {rate:8.1f}", flush=True)
    return ratios


def statistics(lr: Pixels) -> tuple[float, ...]:
    """Return mean, variance, mean squared gradient and the energy above half the Nyquist frequency, of luminance."""
    luma = lr @ np.array([0.299, 0.587, 0.114])
    gradient = np.mean(np.diff(luma, axis=0) ** 2) + np.mean(np.diff(luma, axis=1) ** 2)
    power = np.abs(np.fft.fft2(luma - luma.mean())) ** 2 / luma.size**2
    y, x = (np.abs(np.fft.fftfreq(side)) for side in luma.shape)
    return float(luma.mean()), float(luma.var()), float(gradient), float(power[np.maximum.outer(y, x) > 0.25].sum())


def compare(sides: tuple[Side, Side], count: int) -> float:
    """Degrade `count` photographs on both sides, print both distributions, and return the least p of the four tests."""
    photos, least = photographs(), 1.0
    found = [np.array([statistics(side([photos[i % len(photos)]])[0]) for i in range(count)]) for side in sides]
    print(f"\n{count} images a side, one at a time\n{'':<18} {'ours: median, 10 %, 90 %':>30} {'reference':>30} {'KS':>7} {'p':>7}")
    for index, name in enumerate(MEASURES):
        columns = [values[:, index] for values in found]
        test = ks_2samp(*columns)
        shown = [" ".join(f"{value:9.4g}" for value in np.quantile(column, [0.5, 0.1, 0.9])) for column in columns]
        print(f"{name:<18} {shown[0]:>30} {shown[1]:>30} {test.statistic:7.3f} {test.pvalue:7.3f}", flush=True)
        least = min(least, float(test.pvalue))
    return least


def main() -> int:
    """Run both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="folder with basicsr and realesrgan")
    parser.add_argument("--batches", type=int, default=60, help="batches of each side without sharpening")
    parser.add_argument("--batches-usm", type=int, default=12, help="batches of each side with sharpening")
    parser.add_argument("--images", type=int, default=400, help="images of each side for the distributions")
    parser.add_argument("--least", type=float, nargs=2, default=(4.0, 6.0), help="least ratio of medians and of means")
    parser.add_argument("--least-usm", type=float, default=40.0, help="least ratio of both with sharpening")
    parser.add_argument("--alpha", type=float, default=0.001)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the reference draws from it)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    plain, usm = RealEsrganDegradation(gt_usm=False), RealEsrganDegradation()
    reference = Reference(options.peer, plain)
    print(
        f"{'CPU ms/image':<12} {'ours: median':>12} {'mean':>6} {'ref.: median':>12} {'mean':>6} {'medians':>8} {'means':>7} {'ours/s':>8}"
    )
    ratios = race((ours(plain, rng), reference), options.batches, "without USM")
    ratios_usm = race((ours(usm, rng), Reference(options.peer, usm)), options.batches_usm, "with USM")
    least_p = compare((ours(plain, rng), reference), options.images)
    fast = ratios[0] >= options.least[0] and ratios[1] >= options.least[1] and min(ratios_usm) >= options.least_usm
    return 0 if fast and least_p >= options.alpha else 1


if __name__ == "__main__":
    sys.exit(main())
