"""The split of the noise axis into experts, and THE routing function. Imports no torch.

Times are noise levels t in [0, 1] after flow shift (what the network sees); t = 1 is pure noise. Expert 0 is the
noisiest. The loss, the samplers, the search and the export all ask `route`.
Source: LinearSR section 3 (SNR-based mixture of experts); method.md part 3.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import exp, inf, log

EFFECTIVE_LOG_SNR = (-7.044, 8.885)
"""Range of log-SNR whose bisection at 0.875 gives the paper's three boundaries. method.md 3.2."""

_LARGE = 100.0


def log_snr(noise_level: float) -> float:
    """Return lambda(t) = 2 ln((1 - t) / t); -inf at t = 1 and inf at t = 0. Source: method.md 1.2."""
    if noise_level >= 1:
        return -inf
    return inf if noise_level <= 0 else 2 * log((1 - noise_level) / noise_level)


def noise_level(log_snr_value: float) -> float:
    """Return the t in [0, 1] whose log-SNR is `log_snr_value`; the inverse of `log_snr`."""
    half = log_snr_value / 2
    # exp(half) overflows at 710; long before, the 1 beside it has no weight.
    return exp(-half) if half > _LARGE else 1 / (1 + exp(half))


def bisect_boundaries(
    anchor: float = 0.875,
    *,
    log_snr_min: float = EFFECTIVE_LOG_SNR[0],
    log_snr_max: float = EFFECTIVE_LOG_SNR[1],
) -> tuple[float, float, float]:
    """Return three ascending boundaries: `anchor`, and the log-SNR midpoints of both sides of it.

    Raises:
        ValueError: if the anchor lies outside the range.
    Source: LinearSR section 3; the defaults give (0.223, 0.875, 0.939).
    """
    middle = log_snr(anchor)
    if not log_snr_min < middle < log_snr_max:
        allowed = (noise_level(log_snr_max), noise_level(log_snr_min))
        raise ValueError(f"experts.anchor: got {anchor}; expected a noise level inside {allowed}")
    return noise_level((log_snr_max + middle) / 2), anchor, noise_level((log_snr_min + middle) / 2)


def route(t: float, boundaries: Sequence[float]) -> int:
    """Return the index of the expert for noise level t; a boundary itself belongs to the noisier expert.

    Source: method.md 3.7.
    """
    return sum(t < boundary for boundary in boundaries)


def intervals(boundaries: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Return each expert's [low, high) noise levels, noisiest first; together they tile [0, 1]."""
    edges = (0.0, *boundaries, 1.0)
    return tuple(pairwise(edges))[::-1]


def training_interval(index: int, boundaries: Sequence[float], overlap_log_snr: float) -> tuple[float, float]:
    """Return the noise levels expert `index` trains on: its own, and `overlap_log_snr` past each inner edge.

    Source: method.md 3.6 (soft assignment in training, hard routing at inference).
    """
    low, high = intervals(boundaries)[index]
    if overlap_log_snr == 0:  # There and back by way of log-SNR would move an edge by a rounding.
        return low, high
    return (
        low if low == 0 else noise_level(log_snr(low) + overlap_log_snr),
        high if high == 1 else noise_level(log_snr(high) - overlap_log_snr),
    )


def steps_per_expert(times: Sequence[float], boundaries: Sequence[float]) -> tuple[int, ...]:
    """Count how many of the sampler's `times` each expert serves; a 0 means that it never runs."""
    served = [route(t, boundaries) for t in times]
    return tuple(served.count(index) for index in range(len(boundaries) + 1))
