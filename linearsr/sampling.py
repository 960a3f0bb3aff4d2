"""Samplers as pure functions of a denoiser and a list of noise levels.

A denoiser maps (z_t, t) to an estimate of z_0. Latents and the solver's state stay in float32.
Source: method.md 1.5, 1.6, 3.7.
"""

from collections.abc import Callable, Sequence
from math import expm1, log

from torch import Tensor

from linearsr.schedule import sampling_times

__all__ = ["Denoiser", "sample", "sample_dpm_solver_2m", "sample_euler", "sampling_times"]

Denoiser = Callable[[Tensor, float], Tensor]


def sample_euler(denoise: Denoiser, noise: Tensor, times: Sequence[float]) -> Tensor:
    """Follow the flow by Euler steps from `noise` at times[0] to 0 and return z_0, (B, c, H, W)."""
    z = noise
    for now, after in zip(times, (*times[1:], 0.0), strict=True):
        clean = denoise(z, now)
        # z + (t' - t) v with v = (z - z_0) / t, written so that the last step returns the estimate itself.
        z = clean + (after / now) * (z - clean)
    return z


def sample_dpm_solver_2m(
    denoise: Denoiser, noise: Tensor, times: Sequence[float], expert_of: Callable[[float], int], *, keep_history: bool = False
) -> Tensor:
    """Follow the flow by DPM-Solver++(2M) and return z_0, (B, c, H, W).

    The first and last steps are of first order, and so is each step after a switch of experts unless `keep_history`: an
    estimate of another network is no history. Source: method.md 1.5, 3.7.
    """
    z = noise
    previous: tuple[Tensor, float, float] | None = None  # estimate, time, and step size in half log-SNR
    for now, after in zip(times, (*times[1:], 0.0), strict=True):
        clean = denoise(z, now)
        if after == 0:
            return clean
        # At t = 1 half the log-SNR is minus infinity; a first-order step needs no step size.
        step = log((1 - after) / after) - log((1 - now) / now) if now < 1 else None
        if step is None:
            z = clean + (after / now) * (z - clean)
            continue
        blended = clean
        if previous is not None and (keep_history or expert_of(previous[1]) == expert_of(now)):
            ratio = previous[2] / step
            blended = clean + (clean - previous[0]) / (2 * ratio)
        z = (after / now) * z - (1 - after) * expm1(-step) * blended
        previous = (clean, now, step)
    return z


def sample(
    denoise: Denoiser,
    noise: Tensor,
    times: Sequence[float],
    *,
    kind: str,
    expert_of: Callable[[float], int],
    keep_history: bool = False,
) -> Tensor:
    """Draw z_0 from `noise` (B, c, H, W) by the named sampler, `euler` or `dpm++2m`, which alone has a history."""
    if kind == "euler":
        return sample_euler(denoise, noise, times)
    return sample_dpm_solver_2m(denoise, noise, times, expert_of, keep_history=keep_history)
