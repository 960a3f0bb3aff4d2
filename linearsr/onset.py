"""Where validation curves begin to oscillate or to decline: a sequential test that looks at no later evaluation. No torch.

Each earlier evaluation is tried as the onset. Its null model, from `linearsr.scatter`, says where later evaluations must lie if nothing
got worse: on the level reached there or above it. Two log-likelihood ratios speak against it, summed over metrics in units of their
own noise: the scatter grew (oscillation), or the mean fell (decline). Rising curves can produce neither, because only what lies under the
level counts, so the test is careful exactly where an alarm would do harm. The threshold was set by simulation, see tests/benchmarks/knee.
Shape letters: V tried onsets, J evaluations after the first of them, M metrics.
Source: method.md 4.5 (iii)-(vi); generalised likelihood ratio in place of CUSUM, so that all metrics are weighed at once.
"""

from dataclasses import dataclass
from math import log
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from linearsr.scatter import FEWEST, Array, Scatter, average_scatter, measure_scatter, rise_score, variance_inflation

_LOOK_BACK = 40  # Evaluations that are tried as the onset.
_SHORTEST = 3  # Evaluations after an onset before it can be seen, so that one bad evaluation is none.
_FOLDS = (2.0, 3.0, 5.0)  # Growth of the noise that is tested for.
_CUT = 4.0  # Noise units at which a single value counts no further.
_CUT_LEVEL = 4.0  # The same where the mean is tested.
_LONE = 1.5  # Times the second worst evaluation at which the worst one counts no further: noise with heavy tails is far out once.
_LEAST_RHO = 0.3  # Autocorrelation up to which no evidence is gained: over a short window 0.3 is often measured as less.
_OSCILLATION, _DECLINE = 2.5, 6.5  # Log-likelihood ratios that prove either.
_LATE, _EARLY = 1.0, 40  # Added for each natural logarithm of the evaluations over so many: every one was a chance of a false alarm.
_BOTH = 0.3  # Share of the weaker one that is added, for they come together.
_RECENT, _LASTING = 4, 6  # Evaluations over which scale and autocorrelation are averaged.
_RISE_SHORTEST, _RISE_LONGEST = 4, 10  # Evaluations before an onset that tell whether the curve still rose there.
_RISE_CAUTION, _RISE_MOST = 0.5, 3.0  # More evidence needed for each standard error of that rise, and up to how many.
_ENOUGH_TO_LEAVE_OUT = 3  # Metrics from which on no single one can prove anything.
_NEARLY = 0.5  # Share of the strongest evidence.
_BACKWARD = 8  # Evaluations by which an onset may be moved back when it is dated.
_DATING_CUT, _DATING_CUT_ABOVE = 5.0, 2.0  # Below and above the level, for the curve may have risen further before the onset.
_DATING_PRIOR = 4.0  # Values of unit variance that stand for the null model.
_UNCERTAIN = 2.0  # Log-likelihood below the maximum that is still inside the range of an onset.
_ITERATIONS = 3


@dataclass(frozen=True, slots=True)
class Onset:
    """The strongest evidence that something got worse."""

    score: float
    """Evidence over the threshold: 1 or more is proof."""
    index: int
    """Last evaluation before it."""
    earliest: int
    """The earliest it may have been; at most `index`."""
    kind: Literal["oscillation", "decline"]
    shares: Array
    """(M,), what each metric contributed, as a log-likelihood ratio."""


class OnsetSearch:
    """Takes evaluations of M oriented metrics one at a time and says where they began to get worse."""

    def __init__(self) -> None:
        """Start without evaluations."""
        self._count = 0
        self._table = np.empty((0, 0))
        """Evaluations, (N or more, M): doubled when full, because copying all of them for each new one takes hours for 50,000."""
        self._raw: list[Scatter | None] = []
        self._null: list[Scatter | None] = []
        self._cautions: list[float] = []

    def append(self, row: Array) -> None:
        """Take one evaluation (M,), higher is better, NaN where a value is missing."""
        if self._count == len(self._table):
            room = np.empty((max(64, self._count), len(row)))
            self._table = np.concatenate([self._table, room]) if self._count else room
        self._table[self._count] = row
        self._count += 1
        values = self.values
        scatter = measure_scatter(values)
        self._raw.append(scatter)
        averaged = None
        if scatter is not None:
            known = [each for each in self._raw[-_LASTING:] if each is not None]
            averaged = average_scatter(known[-_RECENT:], known)
        self._null.append(averaged)
        self._cautions.append(self._caution(averaged))

    @property
    def values(self) -> Array:
        """All evaluations so far, (N, M)."""
        return self._table[: self._count]

    @property
    def scatter(self) -> Scatter | None:
        """The null model at the last evaluation; None while there are too few."""
        return self._null[-1] if self._null else None

    def gain(self, index: int) -> float:
        """Return by how many units of noise the mean metric rose from its first value to its level at an earlier evaluation."""
        null = self._null[index]
        if null is None:
            return 0.0
        values = self.values[: index + 1]
        first = np.array([next((value for value in series if np.isfinite(value)), np.nan) for series in values.T])
        gains = (null.level - first) / null.scale
        return float(np.nanmean(gains)) if np.isfinite(gains).any() else 0.0

    def rises(self) -> float:
        """Return by how many standard errors the curves rose over the last evaluations."""
        scatter = self.scatter
        return 0.0 if scatter is None else self._rise(scatter)

    def rises_each(self) -> Array:
        """Return the same for each metric (M,) by itself."""
        scatter = self.scatter
        recent = self._recent()
        if scatter is None:
            return np.zeros(recent.shape[1])
        columns = range(recent.shape[1])
        return np.array([rise_score(recent[:, [c]], scatter.scale[[c]], rho=scatter.rho, correlation=1.0) for c in columns])

    def strongest(self) -> Onset | None:
        """Return the onset that the evaluations speak for most; None while there are too few."""
        now = self._count - 1
        first = max(FEWEST - 1, now - _LOOK_BACK)
        tried = [index for index in range(first, now - _SHORTEST + 1) if self._null[index] is not None]
        if not tried:
            return None
        models = [null for index in tried if (null := self._null[index]) is not None]
        evidence = _Evidence(self.values[tried[0] + 1 :], np.array(tried) - tried[0], models)
        caution = np.array([self._cautions[index] for index in tried])
        late = _LATE * max(0.0, log((now + 1) / _EARLY))
        oscillation = evidence.oscillation() / (_OSCILLATION + late) / caution
        decline = evidence.decline() / (_DECLINE + late) / caution
        weaker = np.clip(np.minimum(oscillation, decline), 0, None)
        scores = np.maximum(oscillation, decline) + _BOTH * weaker
        best = int(np.argmax(scores))
        kind: Literal["oscillation", "decline"] = "oscillation" if oscillation[best] > decline[best] else "decline"
        # An early onset collects evidence for as long as the curve goes on; a later one that says nearly as much dates it better.
        latest = int(np.flatnonzero(scores >= _NEARLY * scores[best])[-1]) if scores[best] > 0 else best
        index, earliest = self._date(tried[latest], kind)
        return Onset(float(scores[best]), index, earliest, kind, evidence.shares(best))

    def _caution(self, scatter: Scatter | None) -> float:
        """Return by what factor an onset at the last evaluation needs more evidence, because the curve still rose there."""
        if scatter is None:
            return 1.0
        return 1 + _RISE_CAUTION * min(max(self._rise(scatter), 0.0), _RISE_MOST)

    def _recent(self) -> Array:
        """Return the evaluations that tell whether the curves still rise: the last third, within bounds."""
        return self.values[-min(max(self._count // 3, _RISE_SHORTEST), _RISE_LONGEST) :]

    def _rise(self, scatter: Scatter) -> float:
        return rise_score(self._recent(), scatter.scale, rho=scatter.rho, correlation=scatter.correlation)

    def _date(self, index: int, kind: Literal["oscillation", "decline"]) -> tuple[int, int]:
        """Move an onset to where the noise most probably grew; returns it and the earliest that is nearly as probable."""
        values, now, earliest = self.values, self._count - 1, index
        for _ in range(_ITERATIONS):
            null = self._null[index]
            if null is None:
                break
            distances = np.concatenate([null.residuals, values[index + 1 :] - null.level])
            squares = np.square(np.clip(distances / null.scale, -_DATING_CUT, _DATING_CUT_ABOVE))
            begin = now + 1 - len(squares)
            first = max(FEWEST - 1, index - _BACKWARD, begin)
            likelihood = _variance_change(squares, np.arange(first, now) - begin) * _independent_share(null, len(null.level))
            moved = index if kind == "decline" else first + int(np.argmax(likelihood))
            near = np.flatnonzero(likelihood[: moved - first + 1] >= likelihood[moved - first] - _UNCERTAIN)
            earliest = first + int(near[0])
            if moved == index:
                break
            index = moved
        return index, earliest


class _Evidence:
    """Distances of evaluations from the levels of all tried onsets, and what they prove."""

    def __init__(self, values: Array, tried: NDArray[np.int64], models: list[Scatter]) -> None:
        """Scale the evaluations (J, M) after the first tried onset by the null model of each (V)."""
        level, scale = np.stack([model.level for model in models]), np.stack([model.scale for model in models])
        self._rho = np.array([model.rho for model in models])
        self._correlation = np.array([model.correlation for model in models])
        self._level_variance = variance_inflation(self._rho, np.array([model.level_count for model in models]))
        distances = (values - level[:, None]) / scale[:, None]  # (V, J, M)
        later = np.arange(len(values)) >= tried[:, None]
        counted = later[:, :, None] & np.isfinite(distances)
        self._distances = np.where(counted, distances, 0.0)
        self._counts = counted.sum(axis=1).astype(float)  # (V, M)
        self._metrics = np.maximum((self._counts > 0).sum(axis=1), 1)
        freedom = np.stack([model.freedom for model in models])
        # Sums over all metrics, and over all but one: (V, 1 + M).
        self._sum_counts, self._freedom = _leave_out(self._counts), np.maximum(_leave_out(freedom), 1.5)
        self._weights = np.ones_like(self._sum_counts)
        self._weights[:, 1:] = (self._metrics / np.maximum(self._metrics - 1, 1))[:, None]

    def oscillation(self) -> Array:
        """Return the log-likelihood ratio (V,) of noise that grew against noise that did not.

        What lies under the level must be as far out as oscillation brings it, and what lies above it can add no more than that:
        a rise or a step upwards is no oscillation.
        """
        below, both = (_leave_out(part) for part in self._squares())
        best = np.full(len(below), -np.inf)
        for fold in _FOLDS:
            ratio = np.minimum(
                _growth(both, self._sum_counts, self._freedom, fold), 2 * _growth(below, self._sum_counts / 2, self._freedom, fold)
            )
            best = np.maximum(best, self._without_any(ratio * self._weights))
        # Squares of correlated values repeat what others say.
        shared = 1 / (1 + (self._metrics - 1) * self._correlation**2)
        return np.asarray(best * shared * _independent(self._rho))

    def decline(self) -> Array:
        """Return the log-likelihood ratio (V,) of a mean under the level against a mean on it."""
        clipped = np.clip(self._distances, -_CUT_LEVEL, _CUT_LEVEL).sum(axis=1) / np.maximum(self._counts, 1)
        present = np.maximum(_leave_out((self._counts > 0).astype(float)), 1)
        mean = _leave_out(clipped) / present
        length = self._counts.max(axis=1)
        one = variance_inflation(self._rho, length) + self._level_variance
        error = np.sqrt(one[:, None] * (1 + (present - 1) * self._correlation[:, None]) / present)
        score = np.maximum(-mean / error, 0)
        return self._without_any(self._freedom / 2 * np.log1p(np.square(score) / self._freedom) * self._weights)

    def shares(self, index: int) -> Array:
        """Return what each metric (M,) by itself says for one of the onsets: the larger of the two ratios."""
        counts, freedom = self._counts[index], np.maximum(self._freedom[index, 0] / self._metrics[index], 1.5)
        below, both = (part[index] for part in self._squares())
        growth = [np.minimum(_growth(both, counts, freedom, f), 2 * _growth(below, counts / 2, freedom, f)) for f in _FOLDS]
        mean = np.clip(self._distances[index], -_CUT_LEVEL, _CUT_LEVEL).sum(axis=0) / np.maximum(counts, 1)
        error = np.sqrt(variance_inflation(self._rho[index], counts) + self._level_variance[index])
        fall = freedom / 2 * np.log1p(np.square(np.maximum(-mean / error, 0)) / freedom)
        return np.asarray(np.maximum(np.max(growth, axis=0) * _independent(self._rho[index]), fall))

    def _squares(self) -> tuple[Array, Array]:
        """Return sums over evaluations of squared distances (V, M): of those under the level, and of all."""
        squares = np.minimum(np.square(self._distances) / (1 + self._level_variance)[:, None, None], _CUT**2)
        return _without_lone(squares * (self._distances < 0)).sum(axis=1), _without_lone(squares).sum(axis=1)

    def _without_any(self, ratios: Array) -> Array:
        """Return from ratios (V, 1 + M) what is left whichever metric is left out, where there are enough of them."""
        return np.where(self._metrics >= _ENOUGH_TO_LEAVE_OUT, ratios.min(axis=1), ratios[:, 0])


def _leave_out(parts: Array) -> Array:
    """Return sums over metrics (V, 1 + M): of all, then without each."""
    total = parts.sum(axis=1, keepdims=True)
    return np.concatenate([total, total - parts], axis=1)


def _growth(squares: Array, count: Array, freedom: Array, fold: float) -> Array:
    """Return the log-likelihood ratio of noise `fold` times as large, the scale known to `freedom` degrees only (Student's t)."""
    return np.asarray(-count * np.log(fold) + (freedom + count) / 2 * np.log((freedom + squares) / (freedom + squares / fold**2)))


def _without_lone(squares: Array) -> Array:
    """Shrink the worst evaluation of squares (V, J, M), over all metrics, to a multiple of the second worst."""
    totals = squares.sum(axis=2)
    most = _LONE * np.sort(totals, axis=1)[:, -2:-1]
    return np.asarray(squares * np.minimum(1.0, most / np.maximum(totals, 1e-12))[:, :, None])


def _independent(rho: Array) -> Array:
    """Return the share of squared values that does not repeat those before, at an autocorrelation."""
    rho = np.maximum(rho, _LEAST_RHO)
    return np.asarray((1 - rho**2) / (1 + rho**2))


def _independent_share(null: Scatter, metrics: int) -> float:
    """Return the share of squared values of M metrics that is not a repetition."""
    return (1 - null.rho**2) / (1 + null.rho**2) / (1 + (metrics - 1) * null.correlation**2)


def _variance_change(squares: Array, tried: NDArray[np.int64]) -> Array:
    """Return the log-likelihood (V,) that the variance of (N, M) values at least doubles after each tried evaluation."""
    counts, sums = np.isfinite(squares).sum(axis=1).cumsum(), np.nansum(squares, axis=1).cumsum()
    before, before_sum = counts[tried] + _DATING_PRIOR, sums[tried] + _DATING_PRIOR
    after, after_sum = counts[-1] - counts[tried], sums[-1] - sums[tried]
    low = before_sum / before
    high = np.maximum(after_sum / np.maximum(after, 1), 2 * low)
    return np.asarray(-(before * np.log(low) + before_sum / low + after * np.log(high) + after_sum / high) / 2)
