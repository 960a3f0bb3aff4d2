"""What PSNR, SSIM and MS-SSIM of our own cost against pyiqa's, and how far they are apart.

Run: `OMP_NUM_THREADS=1 python tests/benchmarks/metrics.py`. Pairs of photographs, one thread, both sides in turns in one process after one
call of each to warm up, by CPU time. PSNR runs in plain torch and by a compiled kernel. Exits with 1 if a ratio of medians is under
`--least` (for PSNR in plain torch `--least-psnr`: it has so little to compute that fetching both pictures from memory is a good part of
it) or a value is off by more than `--apart`. SSIM and PSNR are compared on the same Y: pyiqa's `ssim` rounds Y to whole levels, so its own
value is shown beside.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from time import process_time

import numpy as np
import pyiqa
import skimage.data
import torch
from pyiqa.archs.ssim_arch import ssim
from torch import Tensor

from linearsr.kernels.build import build_kernels
from linearsr.similarity import ms_ssim, psnr_y, ssim_y

Measure = Callable[[Tensor, Tensor], Tensor]


def pairs(side_px: int) -> list[tuple[Tensor, Tensor]]:
    """Photographs and noisy copies of them, both 8 bit, (1, 3, side, side) in [0, 1]."""
    found = []
    for index, name in enumerate(("astronaut", "coffee", "rocket")):
        photo = getattr(skimage.data, name)()
        photo = np.pad(photo, [(0, max(0, side_px - side)) for side in photo.shape[:2]] + [(0, 0)], mode="symmetric")[:side_px, :side_px]
        hr = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].float() / 255
        noise = torch.randn(hr.shape, generator=torch.Generator().manual_seed(index))
        found.append((((hr + 0.03 * noise).clamp(0, 1) * 255).round() / 255, hr))
    return found


def on_same_luma(sr: Tensor, hr: Tensor) -> Tensor:
    """pyiqa's SSIM of studio-range Y that was not rounded."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64).view(1, 3, 1, 1)
    x, y = ((image.double() * weights).sum(dim=1, keepdim=True) + 16 for image in (sr, hr))
    return ssim(x, y, data_range=255)  # type: ignore[no-any-return]


def compare(name: str, ours: Measure, theirs: Measure, exact: Measure, rounds: int, side_px: int) -> tuple[float, float]:
    """Time both in turns, print a row, and return the ratio of medians and the largest difference from `exact`."""
    spent: tuple[list[float], list[float]] = ([], [])
    images = pairs(side_px)
    for measure in (ours, theirs):
        measure(*images[0])
    for number in range(rounds):
        for side in (0, 1) if number % 2 else (1, 0):
            started = process_time()
            (ours, theirs)[side](*images[number % len(images)])
            spent[side].append(process_time() - started)
    ratio = median(spent[1]) / median(spent[0])
    apart = max(abs(float(ours(*pair)) - float(exact(*pair))) for pair in images)
    beside = max(abs(float(ours(*pair)) - float(theirs(*pair))) for pair in images)
    print(f"{name:<8} {median(spent[0]) * 1e3:9.2f} {median(spent[1]) * 1e3:9.1f} {ratio:8.1f} {apart:12.1e} {beside:14.1e}")
    return ratio, apart


def main() -> None:
    """Print a table and say by the exit code whether it is as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each side")
    parser.add_argument("--least", type=float, default=20, help="least ratio of CPU times of SSIM and MS-SSIM")
    parser.add_argument("--least-psnr", type=float, default=5, help="the same for PSNR")
    parser.add_argument("--side", type=int, default=512, help="of the photographs, px")
    parser.add_argument("--apart", type=float, default=1e-5, help="largest difference of values")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    their_psnr, their_ssim = (
        pyiqa.create_metric(name, device=cpu, color_space="ycbcr", **more) for name, more in (("psnry", {"eps": 0}), ("ssim", {}))
    )
    their_ms_ssim = pyiqa.create_metric("ms_ssim", device=cpu)

    def exact_psnr(sr: Tensor, hr: Tensor) -> Tensor:
        return their_psnr(sr.double(), hr.double())  # type: ignore[no-any-return]

    print(f"{'metric':<8} {'ours ms':>9} {'pyiqa ms':>9} {'ratio':>8} {'same Y':>12} {'as it comes':>14}")
    rows = [
        (arguments.least_psnr, *compare("psnr_y", psnr_y, their_psnr, exact_psnr, 8 * arguments.rounds, arguments.side)),
        (
            arguments.least,
            *compare("compiled", partial(psnr_y, kernels=build_kernels()), their_psnr, exact_psnr, 8 * arguments.rounds, arguments.side),
        ),
        (arguments.least, *compare("ssim_y", ssim_y, their_ssim, on_same_luma, arguments.rounds, arguments.side)),
        (arguments.least, *compare("ms_ssim", ms_ssim, their_ms_ssim, their_ms_ssim, arguments.rounds, arguments.side)),
    ]
    sys.exit(any(ratio < least or apart > arguments.apart for least, ratio, apart in rows))


if __name__ == "__main__":
    with torch.no_grad():
        main()
