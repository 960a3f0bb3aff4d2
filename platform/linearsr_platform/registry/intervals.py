"""How far the mean over a test set may be off because the set has no more images."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
"""Of the interval beside every mean."""
SEED = 0
"""Of the drawing, so that the same values give the same interval."""
RESAMPLES = 2000
"""Draws; an end of the interval is then off by a few hundredths of its width."""
_AT_ONCE = 4_000_000
"""Numbers held at a time, so that thousands of images do not fill the memory."""


def mean_intervals(
    values: Mapping[str, Mapping[str, float]], *, confidence: float = CONFIDENCE, seed: int = SEED, resamples: int = RESAMPLES
) -> dict[str, tuple[float, float]]:
    """Return the percentile interval of each metric's mean, by a bootstrap over images that all metrics share.

    The order of the images does not matter: they are drawn in order of name. A metric with a value that is not finite gets NaN.

    Args:
        values: metric to image to value; the same images for every metric.
        confidence: of the two-sided interval, in (0, 1).
        seed: of the drawing.
        resamples: how often to draw.
    Source: Efron and Tibshirani 1993, chapter 13.
    """
    metrics = list(values)
    names = sorted({image for images in values.values() for image in images})
    if not names:
        return {}
    table = np.array([[values[metric][name] for metric in metrics] for name in names])
    low, high = np.quantile(_resampled_means(table, seed, resamples), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return {metric: (float(low[place]), float(high[place])) for place, metric in enumerate(metrics)}


def _resampled_means(table: NDArray[np.float64], seed: int, resamples: int) -> NDArray[np.float64]:
    """Return the means (R, M) of rows of (N, M) drawn with replacement."""
    rng, count, parts, left = np.random.default_rng(seed), len(table), [], resamples
    while left:
        draws = min(left, max(1, _AT_ONCE // count))
        # How often each image was drawn weighs as much as the images themselves, and needs one product for all metrics.
        weights = rng.multinomial(count, np.full(count, 1 / count), size=draws)
        parts.append(weights @ table / count)
        left -= draws
    return np.concatenate(parts)
