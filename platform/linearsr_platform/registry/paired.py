"""How much two models differ on the same images, by a paired bootstrap."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

import numpy as np

FEW_IMAGES = 5
"""With fewer images a bootstrap interval is hardly worth its name: it knows no values but these."""
_AT_ONCE = 4_000_000
"""Numbers drawn at a time, so that thousands of images do not fill the memory."""


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """The mean of ours minus theirs over images, in the metric's unit."""

    mean: float
    low: float
    high: float
    """Ends of the interval."""
    images: int

    @property
    def weak(self) -> bool:
        """Whether there are too few images for the interval to mean much."""
        return self.images < FEW_IMAGES


def paired_difference(
    ours: Mapping[str, float], theirs: Mapping[str, float], *, confidence: float, seed: int, resamples: int
) -> PairedDifference:
    """Estimate the mean difference of two models' values, with the percentile interval of a bootstrap over images.

    Images are drawn with replacement, each with both its values: what makes an image hard for both cancels out.

    Args:
        ours, theirs: image to value; the same images.
        confidence: of the two-sided interval, in (0, 1).
        seed: of the drawing; the same seed gives the same interval.
        resamples: how often to draw.

    Raises:
        ValueError: if the images differ, there is none, or a value is not finite.
    Source: Efron and Tibshirani 1993, chapter 13.
    """
    if ours.keys() != theirs.keys() or not ours:
        odd = sorted(ours.keys() ^ theirs.keys())
        raise ValueError(
            f"images: got {len(ours)} and {len(theirs)}, not in both: {', '.join(odd[:3]) or 'none'}; expected the same images"
        )
    names = sorted(ours)
    spoilt = [name for name in names if not (isfinite(ours[name]) and isfinite(theirs[name]))]
    if spoilt:
        raise ValueError(f"images: got a value of {spoilt[0]} that is not finite; expected numbers; fix: evaluate again")
    differences = np.array([ours[name] - theirs[name] for name in names])
    rng, count = np.random.default_rng(seed), len(names)
    means: list[float] = []
    while len(means) < resamples:
        draws = min(resamples - len(means), max(1, _AT_ONCE // count))
        means += differences[rng.integers(0, count, (draws, count))].mean(axis=1).tolist()
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return PairedDifference(mean=float(differences.mean()), low=float(low), high=float(high), images=count)
