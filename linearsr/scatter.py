"""How validation curves scatter about their trend: level, noise, its autocorrelation, its correlation between metrics. No torch.

Everything is measured on the evaluations up to one point and serves as the null model for what comes after it: without oscillation
or decline, later evaluations lie on the level or above it, with the same noise. Shape letters: N evaluations, M metrics.
Source: method.md 4.5 (i), (ii), with second differences at three lags in place of one-step residuals, because their ratio tells
independent noise from slowly wandering noise whatever the trend; the correlation of neighbouring residuals makes it surer.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import log, sqrt

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FEWEST = 5
"""Values of a metric before anything is said about its noise."""
_WINDOWS = (14, 28, 56)  # Evaluations looked back over; the longest whose noise is not much larger than the shorter one's.
_SEEN = 2 * _WINDOWS[-1]  # Evaluations that are looked at for the values of a window, where some are missing.
_WINDOW_GROWTH = 2.0  # Ratio of variances from which a longer window is taken to hold something else than noise, such as a stair.
_TIME_CONSTANTS = (0.7, 1.5, 3.0, 6.0, 12.0, 25.0, 50.0)  # Of saturating trends, evaluations; a straight line is tried besides.
_LATE_CONSTANTS = (0.3, 2.0)  # Of rises that begin inside the window.
_LATE_RISE = 0.5  # Share of the squares left by a plain trend that a late rise may leave at most.
_OUTLIER = 3 * 1.4826  # Median absolute differences at which single ones are cut.
_PRIOR_RHO, _PRIOR_RHO_WEIGHT = 0.2, 30.0  # Worth 30 differences.
_RATIO_WEIGHT = 0.5  # Of a difference in the ratio of lags, beside a pair of neighbouring residuals.
_CLIP = 3.0  # Standard deviations at which a residual counts no further in a correlation.
_PRIOR_CORRELATION, _PRIOR_CORRELATION_WEIGHT = 0.2, 30.0  # Worth 30 evaluations.
_SMALLEST_RHO = 0.15  # Curves of one network are never quite independent, and too small a value is the costly error.
# Estimates of strong autocorrelation come out too small, because the fitted trend takes a part of it: measured -> true, from simulation.
_RHO_MEASURED = (0.0, 0.1, 0.29, 0.42, 0.53, 0.62, 0.7)
_RHO_TRUE = (0.0, 0.1, 0.3, 0.45, 0.6, 0.75, 0.85)
_INFORMATION = 0.8  # Degrees of freedom of a second difference.
_LEVEL_SHARE = 4.0  # Evaluations of a window for each that its fitted end is worth.
_SMALLEST_SCALE = 1e-3  # Of the spread of the whole history; below it differences are rounding.
_GRID = np.linspace(0, 0.95, 96)


@dataclass(frozen=True, slots=True)
class Scatter:
    """What is known of M curves at one evaluation; NaN for metrics with too few values."""

    level: Array
    """(M,), fitted value at the evaluation."""
    scale: Array
    """(M,), standard deviation of the noise."""
    freedom: Array
    """(M,), degrees of freedom of `scale`; 0 where that is NaN."""
    level_count: float
    """Evaluations that `level` is worth as a mean."""
    rho: float
    """Autocorrelation of the noise from one evaluation to the next."""
    correlation: float
    """Mean correlation of the noise between metrics."""
    residuals: Array
    """(R, M), distance of the last R evaluations from the fit; NaN before its window."""


def variance_inflation(rho: float | Array, count: float | Array) -> Array:
    """Return the variance of a mean of `count` values of an AR(1) series, in units of the variance of one."""
    return np.asarray(np.minimum(1.0, (1 + np.asarray(rho)) / (1 - np.asarray(rho)) / np.maximum(count, 1)))


def measure_scatter(values: Array) -> Scatter | None:
    """Measure the noise of oriented curves (N, M), NaN where a value is missing; None if no metric has `FEWEST` values."""
    seen = values[-_SEEN:]
    best = _measure_window(seen, _WINDOWS[0])
    if best is None:
        return None
    for shorter, length in pairwise(_WINDOWS):
        window = _measure_window(seen, length)
        if window is None or len(seen) <= shorter or _log_ratio(window.scale, best.scale) > log(_WINDOW_GROWTH):
            break
        best = window
    scale = np.maximum(best.scale, smallest_scale(values))
    return Scatter(
        level=best.level,
        scale=scale,
        freedom=np.where(np.isfinite(scale), best.freedom, 0.0),
        level_count=max(1.0, float(best.counts.max()) / _LEVEL_SHARE),
        rho=best.rho,
        correlation=_correlation(best.residuals / scale),
        residuals=best.residuals,
    )


def smallest_scale(values: Array) -> Array:
    """Return the noise (M,) below which differences mean nothing: a share of the spread, or half the step that values are rounded to."""
    smallest = np.zeros(values.shape[1])
    for column, series in enumerate(values.T):
        known = np.unique(series[np.isfinite(series)])
        if len(known) > 1:
            low, high = np.quantile(series[np.isfinite(series)], (0.1, 0.9))
            smallest[column] = max(_SMALLEST_SCALE * (high - low), 0.5 * np.diff(known).min(), 1e-12 * np.abs(known).max())
        elif len(known):
            smallest[column] = 1e-12 * max(1.0, float(np.abs(known).max()))
    return smallest


@dataclass(frozen=True, slots=True)
class _Window:
    """The estimates of one window."""

    level: Array
    scale: Array
    freedom: Array
    counts: Array
    rho: float
    residuals: Array


def _measure_window(values: Array, length: int) -> _Window | None:
    """Fit the last `length` values of each metric and measure what is left; None if no metric has enough."""
    count, metrics = values.shape
    residuals = np.full((count, metrics), np.nan)
    level, counts = np.full(metrics, np.nan), np.zeros(metrics)
    variances, differences = np.zeros((3, metrics)), np.zeros((3, metrics))
    finite = np.isfinite(values)
    everywhere = finite[-length:].all() and count >= FEWEST
    groups = [np.arange(metrics)] if everywhere else [np.array([column]) for column in range(metrics)]
    for columns in groups:
        rows = np.flatnonzero(finite[:, columns[0]])[-length:]
        if len(rows) < FEWEST:
            continue
        rest, end = _detrend(values[np.ix_(rows, columns)])
        residuals[np.ix_(rows, columns)] = rest
        level[columns], counts[columns] = end, len(rows)
        for lag in (1, 2, 3):
            variance, differences[lag - 1, columns] = _difference_variance(rest, lag)
            variances[lag - 1, columns] = variance * len(rows) / max(len(rows) - 2, 1)
    live = counts > 0
    if not live.any():
        return None
    lags = 3 if differences[2, live].min() >= 3 else 2
    rho = _autocorrelation(variances[:lags, live], float(differences[1, live].sum()), residuals[:, live])
    factors = _difference_factor(rho, np.arange(1, lags + 1))[:, None]
    with np.errstate(invalid="ignore"):
        squares = (variances[:lags] * differences[:lags] / factors).sum(axis=0) / differences[:lags].sum(axis=0)
    return _Window(level, np.sqrt(squares), np.maximum(differences[0] * _INFORMATION, 1.5), counts, rho, residuals)


def _detrend(values: Array) -> tuple[Array, Array]:
    """Subtract from each column (N, M) the best rising or flat trend; returns what is left and the trend's ends (M,)."""
    mean = values.mean(axis=0)
    centred = values - mean
    trends, left = zip(*(_best_trend(shapes, centred) for shapes in (_trends(len(values)), _late_trends(len(values)))), strict=True)
    # A late rise explains some noise by chance, so it must explain most of what the plain trend leaves.
    late = left[1] < _LATE_RISE * left[0]
    trend = mean + np.where(late, trends[1], trends[0])
    return values - trend, trend[-1]


def _best_trend(shapes: Array, centred: Array) -> tuple[Array, Array]:
    """Fit each column (N, M) by the best of several shapes, none falling; returns the fits (N, M) and the squares left (M,)."""
    heights = np.maximum(shapes @ centred, 0.0)
    chosen = heights.argmax(axis=0)
    height = heights[chosen, np.arange(centred.shape[1])]
    return shapes[chosen].T * height, np.square(centred).sum(axis=0) - np.square(height)


@cache
def _trends(count: int) -> Array:
    """Return rising trends over `count` evaluations, each of zero mean and unit norm: (trends, count)."""
    time = np.arange(count)
    return _normalised([*(1 - np.exp(-time / constant) for constant in _TIME_CONSTANTS), time / max(count - 1, 1)])


@cache
def _late_trends(count: int) -> Array:
    """Return rises that begin somewhere inside, as after a cut of the learning rate: (trends, count)."""
    time = np.arange(count)
    starts = range(1, max(2, count - 2))
    return _normalised([1 - np.exp(-np.maximum(0, time - start) / constant) for start in starts for constant in _LATE_CONSTANTS])


def _normalised(shapes: list[Array]) -> Array:
    centred = np.stack(shapes) - np.mean(shapes, axis=1, keepdims=True)
    return np.asarray(centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12))


def _difference_variance(rest: Array, lag: int) -> tuple[Array, int]:
    """Return the mean square (M,) of second differences at a lag, outliers cut, and their number."""
    sizes = np.abs(rest[: -2 * lag] - 2 * rest[lag:-lag] + rest[2 * lag :])
    if not len(sizes):
        return np.zeros(rest.shape[1]), 0
    return np.square(np.minimum(sizes, _OUTLIER * np.median(sizes, axis=0))).mean(axis=0), len(sizes)


def _difference_factor(rho: float | Array, lag: int | NDArray[np.int64]) -> Array:
    """Return the variance of a second difference at a lag of an AR(1) series of unit variance."""
    return np.asarray(6 - 8 * np.power(rho, lag) + 2 * np.power(rho, 2 * lag))


@cache
def _ratios(lags: int) -> Array:
    """Return, for each autocorrelation of the grid, the mean variance at the longer lags over that at lag 1."""
    longer = np.stack([_difference_factor(_GRID, lag) for lag in range(2, lags + 1)])
    return np.asarray(longer.mean(axis=0) / _difference_factor(_GRID, 1))


def _autocorrelation(variances: Array, weight: float, residuals: Array) -> float:
    """Return the autocorrelation, drawn towards a prior.

    Two estimates are averaged: the one that explains how difference variances (lags, M) grow with the lag, which no trend spoils, and the
    correlation of neighbouring residuals (N, M), which is less noisy.

    Args:
        variances: of second differences at lags 1, 2 and perhaps 3.
        weight: number of differences.
        residuals: what the fitted trend leaves; NaN before its window.
    """
    near, far = np.maximum(variances[0], 1e-300), np.maximum(variances[1:].mean(axis=0), 1e-300)
    ratio = float((np.log(far) - np.log(near)).mean())
    measured = float(np.interp(ratio, np.log(_ratios(len(variances))), _GRID))
    neighbours, pairs = _neighbour_correlation(residuals)
    weight *= _RATIO_WEIGHT
    drawn = (measured * weight + neighbours * pairs + _PRIOR_RHO * _PRIOR_RHO_WEIGHT) / (weight + pairs + _PRIOR_RHO_WEIGHT)
    return max(_SMALLEST_RHO, float(np.interp(drawn, _RHO_MEASURED, _RHO_TRUE)))


def _neighbour_correlation(residuals: Array) -> tuple[float, float]:
    """Return the correlation of neighbouring residuals (N, M) over all metrics, and the number of pairs."""
    size = np.sqrt(np.nanmean(np.square(residuals), axis=0))
    scaled = np.clip(residuals / np.where(size > 0, size, np.nan), -_CLIP, _CLIP)
    known = np.isfinite(scaled)
    pairs = known[:-1] & known[1:]
    count = float(pairs.sum())
    if not count:
        return 0.0, 0.0
    length = known.sum(axis=0).max()
    ratio = float(np.where(pairs, scaled[:-1] * scaled[1:], 0.0).sum() / count / np.square(scaled[known]).mean())
    # What the fitted trend takes away: a mean and a slope.
    return float(np.clip((ratio + 2 / length) / max(1 - 4 / length, 0.2), 0.0, _GRID[-1])), count


def _correlation(scaled: Array) -> float:
    """Return the mean correlation between the columns of residuals (N, M), drawn towards a prior; 0 to 1."""
    live = np.isfinite(scaled).any(axis=0)
    rows = np.clip(scaled[np.isfinite(scaled[:, live]).all(axis=1)][:, live], -_CLIP, _CLIP)
    count, metrics = rows.shape
    if metrics < 2 or count < FEWEST + 1:
        return _PRIOR_CORRELATION
    products = rows.T @ rows
    norms = np.sqrt(np.diag(products)) + 1e-12
    off = ((products / np.outer(norms, norms)).sum() - metrics) / (metrics * (metrics - 1))
    drawn = (off * count + _PRIOR_CORRELATION * _PRIOR_CORRELATION_WEIGHT) / (count + _PRIOR_CORRELATION_WEIGHT)
    return min(1.0, max(0.0, float(drawn)))


def _log_ratio(new: Array, old: Array) -> float:
    """Return the mean log ratio of two variances, over metrics that have both."""
    both = np.isfinite(new) & np.isfinite(old) & (new > 0) & (old > 0)
    return 2 * float(np.log(new[both] / old[both]).mean()) if both.any() else 0.0


def average_scatter(recent: list[Scatter], lasting: list[Scatter]) -> Scatter:
    """Return the last scatter with its scale averaged over `recent` ones and its autocorrelation over `lasting` ones.

    A search over many points would otherwise pick the one whose noise was underestimated most.
    """
    last = recent[-1]
    logs = np.log(np.maximum(np.stack([scatter.scale for scatter in recent]), 1e-300))
    known = np.isfinite(logs)
    mean = np.where(known, logs, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    return Scatter(
        level=last.level,
        scale=np.where(np.isfinite(last.scale), np.exp(mean), np.nan),
        freedom=last.freedom,
        level_count=last.level_count,
        rho=sum(scatter.rho for scatter in lasting) / len(lasting),
        correlation=last.correlation,
        residuals=last.residuals,
    )


def rise_score(values: Array, scale: Array, *, rho: float, correlation: float) -> float:
    """Return by how many standard errors the mean of the scaled metrics rises over the evaluations of `values` (N, M).

    Args:
        values: oriented metrics.
        scale: (M,), their noise.
        rho: its autocorrelation.
        correlation: of the noise between metrics.
    """
    scaled = values / scale
    live = np.isfinite(scaled).any(axis=0)
    if not live.any():
        return 0.0
    scaled = scaled[:, live]
    centred = scaled - np.nanmean(scaled, axis=0)
    rows = np.isfinite(centred).any(axis=1)
    means = np.nanmean(centred[rows], axis=1)
    count, metrics = len(means), int(live.sum())
    if count < 4:
        return 0.0
    time = np.arange(count) - (count - 1) / 2
    error = sqrt((1 + (metrics - 1) * correlation) / metrics * (1 + rho) / (1 - rho))
    return float(time @ means / sqrt(time @ time) / error)
