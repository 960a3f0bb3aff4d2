"""Blur kernels of the second-order degradation: how they are drawn, and what they look like. Imports no torch.

Source: Real-ESRGAN, section 3.1 and appendix A; its published loader for what the paper leaves open (sides, cut-offs, halves of beta).
"""

from dataclasses import dataclass
from math import cos, pi, sin
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from linearsr.degradation_config import KernelKind, SecondOrderDegradation

Kernel = NDArray[np.float32]

TRIMMED_MASS = 2e-4
"""Share of a kernel's mass that its outer rings may hold and still be cut off: moves a pixel by 0.05 of 255 levels at most."""
_BESSEL_NODES = 32
"""Nodes on a quarter of a period. The rule converges faster than any power; arguments are at most 114 (side 51)."""


@dataclass(frozen=True)
class KernelDraw:
    """One kernel, drawn but not yet computed."""

    kind: KernelKind | Literal["sinc"]
    side: int
    """Pixels, odd."""
    sigma: tuple[float, float] = (0.0, 0.0)
    """Standard deviations along the kernel's own axes, pixels."""
    angle: float = 0.0
    """Turn of those axes, radians."""
    beta: float = 1.0
    """Shape of a generalised Gaussian or a plateau."""
    cutoff: float = 0.0
    """Cut-off frequency of a sinc filter, radians a pixel."""


def draw_blur(config: SecondOrderDegradation, suffix: str, rng: np.random.Generator) -> KernelDraw:
    """Draw the kernel of round `suffix`, empty for the first and `2` for the second: a sinc filter or one of `kernel_list`."""
    side = _one_of(config.kernel_sides(suffix), rng)
    if rng.random() < getattr(config, f"sinc_prob{suffix}"):
        # A narrow window cannot hold a low cut-off.
        return KernelDraw("sinc", side, cutoff=rng.uniform(pi / 3 if side < 13 else pi / 5, pi))
    kinds, weights = getattr(config, f"kernel_list{suffix}"), np.asarray(getattr(config, f"kernel_prob{suffix}"))
    kind: KernelKind = kinds[rng.choice(len(kinds), p=weights / weights.sum())]
    widths = getattr(config, f"blur_sigma{suffix}")
    sigma_x = sigma_y = rng.uniform(*widths)
    angle = 0.0
    if kind.endswith("aniso"):
        sigma_y, angle = rng.uniform(*widths), rng.uniform(-pi, pi)
    beta = 1.0
    if kind not in ("iso", "aniso"):
        low, high = getattr(config, f"beta{'g' if kind.startswith('generalized') else 'p'}_range{suffix}")
        beta = rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high)
    return KernelDraw(kind, side, (sigma_x, sigma_y), angle, beta)


def draw_final_sinc(config: SecondOrderDegradation, rng: np.random.Generator) -> KernelDraw | None:
    """Draw the last filter, or None where there is none."""
    if rng.random() >= config.final_sinc_prob:
        return None
    return KernelDraw("sinc", _one_of(config.kernel_sides("2"), rng), cutoff=rng.uniform(pi / 3, pi))


def profile_of(draw: KernelDraw) -> Kernel | None:
    """Return the (side,) profile whose outer product with itself is the kernel, or None if the kernel has none."""
    if draw.kind != "iso":
        return None
    x = np.arange(draw.side) - draw.side // 2
    profile = np.exp(-0.5 * (x / draw.sigma[0]) ** 2)
    profile /= profile.sum()
    lost = np.cumsum(profile[: draw.side // 2])
    # Both dimensions and both ends lose their share.
    cut = int(np.searchsorted(lost, TRIMMED_MASS / 4))
    profile = profile[cut : draw.side - cut]
    kept: Kernel = (profile / profile.sum()).astype(np.float32)
    return kept


def kernel_of(draw: KernelDraw) -> Kernel:
    """Compute the kernel (n, n), n <= side and odd, whose sum is 1; outer rings without weight are cut off."""
    if draw.kind == "sinc":
        return sinc_kernel(draw.cutoff, draw.side)
    axis = np.arange(draw.side) - draw.side // 2
    x, y = axis[None, :], axis[:, None]
    along = (cos(draw.angle) * x + sin(draw.angle) * y) / draw.sigma[0]
    across = (cos(draw.angle) * y - sin(draw.angle) * x) / draw.sigma[1]
    distance = along**2 + across**2
    powered = distance**draw.beta
    kernel = 1 / (1 + powered) if draw.kind.startswith("plateau") else np.exp(-0.5 * powered)
    return _trim(kernel / kernel.sum())


def sinc_kernel(cutoff: float, side: int) -> Kernel:
    """Return the circular low-pass filter (side, side) of `cutoff` radians a pixel, cut off square; its sum is 1.

    Source: Real-ESRGAN, section 3.4, equation 6: cutoff J1(cutoff r) / (2 pi r).
    """
    half = side // 2
    axis = np.arange(half + 1)
    # One quarter holds all there is: few distinct distances, so few Bessel functions.
    squares, where = np.unique(axis[:, None] ** 2 + axis[None, :] ** 2, return_inverse=True)
    radius = np.sqrt(squares[1:])
    values = np.concatenate([[cutoff**2 / (4 * pi)], cutoff * bessel_j1(cutoff * radius) / (2 * pi * radius)])
    quarter = values[where].reshape(half + 1, half + 1)
    full = np.abs(np.arange(-half, half + 1))
    kernel = quarter[np.ix_(full, full)]
    normalised: Kernel = (kernel / kernel.sum()).astype(np.float32)
    return normalised


def bessel_j1(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return J1 of (n,) numbers in [0, 120], within 1e-13: its integral by midpoints, which SciPy is not needed for.

    Source: Abramowitz and Stegun 9.1.21, 2 / pi times the integral of sin(x sin a) sin a from 0 to pi / 2.
    """
    nodes = _BESSEL_NODES + int(x.max(initial=0) / 2)
    waves = np.sin((np.arange(nodes) + 0.5) * (pi / 2 / nodes))
    return np.sin(np.outer(x, waves)) @ waves / nodes  # type: ignore[no-any-return]


def _trim(kernel: NDArray[np.float64]) -> Kernel:
    """Cut off the outer rings of a symmetric kernel that together hold less than `TRIMMED_MASS`."""
    side, kept, cut = kernel.shape[0], 1.0, 0
    for ring in range(1, side // 2):
        kept = kernel[ring : side - ring, ring : side - ring].sum()
        if 1 - kept > TRIMMED_MASS:
            break
        cut = ring
    trimmed = kernel[cut : side - cut, cut : side - cut]
    normalised: Kernel = (trimmed / trimmed.sum()).astype(np.float32)
    return normalised


def _one_of(sides: tuple[int, ...], rng: np.random.Generator) -> int:
    return sides[int(rng.integers(len(sides)))]
