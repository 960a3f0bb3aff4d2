"""Whether a difference between two trainings is more than noise: its mean, error and interval over seeds and crops."""

from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and how far it may be off."""

    mean: float
    error: float
    """Standard error."""
    interval: tuple[float, float]
    """Confidence interval."""


def paired_comparison(values: NDArray[np.float64], *, confidence: float) -> Estimate:
    """Estimate the mean of values over seeds and crops, both of which stand for more of their kind.

    Seeds and crops vary independently of each other, so the variance of the mean is that of the seeds' means over the number of seeds
    plus that of the crops' means over the number of crops. What they cannot tell apart is counted in both: the interval is rather too
    wide. With few seeds Student's t is far from the normal distribution; its degrees of freedom are Satterthwaite's.

    Args:
        values: (seeds, crops), at least 2 of each; differences between pairs of the same seed and crop, or scores.
        confidence: of the interval, in (0, 1).

    Raises:
        ValueError: if there are too few.
    Source: two-way random effects, e.g. Searle, Casella and McCulloch 1992; method.md 5.2 (paired tests on images).
    """
    seeds, crops = values.shape
    if seeds < 2 or crops < 2:
        raise ValueError(f"comparison: got {seeds} seeds and {crops} crops; expected at least 2 of each; fix: raise search.finalists.seeds")
    by_seed, by_crop = (float(np.var(values.mean(axis=axis), ddof=1)) / count for axis, count in ((1, seeds), (0, crops)))
    mean, error = float(values.mean()), sqrt(by_seed + by_crop)
    if error == 0:
        return Estimate(mean=mean, error=0.0, interval=(mean, mean))
    freedom = (by_seed + by_crop) ** 2 / (by_seed**2 / (seeds - 1) + by_crop**2 / (crops - 1))
    reach = error * float(student.ppf((1 + confidence) / 2, freedom))
    return Estimate(mean=mean, error=error, interval=(mean - reach, mean + reach))
