"""Which evaluation's weights to keep: the earliest that is as good as the best. Imports no torch.

Metrics are combined into one curve, each scaled by its own spread, so every metric has the same say and a gain in one makes up for a loss
of the same share in another. Shape letters: N evaluations, M metrics.
Source: method.md 4.3 (composite), 4.5 (vi) (one-SE rule).
"""

from math import sqrt

import numpy as np

from linearsr.scatter import Array

_SMOOTHING = 0.8  # Weight of the next evaluation relative to this one; two-sided, so a peak is not delayed.
_REACH = 20  # Evaluations beyond which a weight of .8 ** 20 = .01 no longer counts.
SURE, UNSURE = 0.3, 1.0
"""Standard errors by which the chosen evaluation may lie under the best: where all is known to be sound, and where it is not."""
_DRAWS = 200
_BLOCK = 3  # Neighbouring residuals that are drawn together, because they are correlated.
_BOOTSTRAPPED = 512  # Evaluations before the last that the bootstrap looks at.
_COVERAGE = (0.05, 0.95)


def composite(values: Array) -> Array:
    """Combine oriented metrics (N, M) into one curve (N,) in units of their spread, 10th to 90th percentile; NaN where none is known."""
    scaled = np.full_like(values, np.nan)
    for column, series in enumerate(values.T):
        known = series[np.isfinite(series)]
        if not len(known):
            continue
        low, middle, high = np.quantile(known, (0.1, 0.5, 0.9))
        spread = high - low if high > low else float(np.ptp(known))
        constant = spread <= 1e-12 * np.abs(known).max()
        scaled[:, column] = np.where(np.isfinite(series), 0.0 if constant else (series - middle) / spread, np.nan)
    known_rows = np.isfinite(scaled).any(axis=1)
    curve = np.full(len(values), np.nan)
    curve[known_rows] = np.nanmean(scaled[known_rows], axis=1)
    return curve


def smoothed(curve: Array) -> Array:
    """Average each point of a curve (N,) with its neighbours on both sides; NaN stays NaN and counts for nothing."""
    known = np.isfinite(curve)
    if not known.any():
        return curve
    kernel = _SMOOTHING ** np.abs(np.arange(-_REACH, _REACH + 1)).astype(float)
    sums = np.convolve(np.where(known, curve, 0.0), kernel)[_REACH:-_REACH]
    weights = np.convolve(known.astype(float), kernel)[_REACH:-_REACH]
    return np.where(known, sums / np.where(known, weights, 1.0), np.nan)


def earliest_best(values: Array, allowed: float) -> int | None:
    """Return the earliest evaluation of (N, M) oriented metrics within `allowed` standard errors of the best; None if none is finite."""
    curve = composite(values)
    if not np.isfinite(curve).any():
        return None
    smooth = smoothed(curve)
    return int(np.flatnonzero(smooth >= np.nanmax(smooth) - allowed * _standard_error(curve))[0])


def selection_interval(values: Array, earliest: int, latest: int, seed: int = 0) -> tuple[int, int]:
    """Return between which evaluations the choice falls in 90 % of bootstrap draws.

    Draws differ in the noise, resampled in blocks, and in where the curve is cut.

    Args:
        values: oriented metrics (N, M).
        earliest: the first evaluation that may have been the last good one.
        latest: the last such, at most N - 1.
        seed: of the draws.
    """
    offset = max(0, latest + 1 - _BOOTSTRAPPED)
    curve = composite(values[: latest + 1])[offset:]
    rows = np.flatnonzero(np.isfinite(curve))
    curve = curve[rows]
    smooth, count = smoothed(curve), len(curve)
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, max(1, count - _BLOCK + 1), (_DRAWS, -(-count // _BLOCK)))
    drawn = (starts[:, :, None] + np.arange(_BLOCK)).reshape(_DRAWS, -1)[:, :count]
    # Smoothing leaves out a part of the noise at each point; the same factor for all puts its size right.
    residuals = (curve - smooth) / sqrt(1 - _kernel_weight(count))
    noisy = smooth + residuals[np.minimum(drawn, count - 1)]
    again = noisy @ _smoothing_matrix(count).T
    cuts = rng.integers(earliest, latest + 1, _DRAWS)
    again = np.where(rows + offset <= np.maximum(cuts, rows[0] + offset)[:, None], again, -np.inf)
    chosen = np.argmax(again >= again.max(axis=1, keepdims=True) - SURE * _standard_error(curve), axis=1)
    low, high = np.quantile(rows[chosen] + offset, _COVERAGE, method="inverted_cdf")
    return int(low), int(high)


def _standard_error(curve: Array) -> float:
    """Return the standard error of a smoothed point of a curve."""
    known = curve[np.isfinite(curve)]
    if len(known) < 3:
        return 0.0
    bends = ((known[:-2] + known[2:]) / 2 - known[1:-1]) * sqrt(2 / 3)
    return float(np.median(np.abs(bends))) * 1.4826 * sqrt(_kernel_weight(len(known)))


def _kernel_weight(count: int) -> float:
    """Return the variance of a smoothed point inside a curve of `count`, in units of the variance of one point."""
    reach = min(_REACH, count - 1)
    weights = _SMOOTHING ** np.abs(np.arange(-reach, reach + 1)).astype(float)
    return min(0.9, float(np.square(weights / weights.sum()).sum()))


def _smoothing_matrix(count: int) -> Array:
    """Return the (N, N) matrix that smooths."""
    distance = np.abs(np.subtract.outer(np.arange(count), np.arange(count)))
    weights = np.where(distance <= _REACH, _SMOOTHING ** distance.astype(float), 0.0)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))
