"""When a training stage has reached its knee (ESGF), decided online from its validation metrics. Imports no torch.

Every decision uses only the evaluations seen so far, and every quantity is in units of the metrics' own history, so the
same detector serves any metric. Feeding the same points again gives the same decisions.
Source: LinearSR, early-stopping guided fine-tuning; the procedure is method.md 4.3-4.7 in its first form.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import pi, sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_SMOOTHING = 0.5  # Weight of the next evaluation relative to this one; two-sided, so a peak is not delayed.
_RECENT_RESIDUALS = 12
_SHORTEST_WINDOW = 6  # Evaluations over which the present slope is measured, at least.
_ONE_SIDED_1_PERCENT = 2.33  # Strict, for the question is asked anew at every evaluation.
_NEGLIGIBLE_GAIN = (0.1, 0.35)  # Of the spread so far, or of the noise: what `patience` more evaluations may still promise.
_DECLINE_ALLOWANCE = 2.0  # Page-Hinkley: noise units by which an evaluation may lie under the best, free of charge,
_DECLINE_ALARM = 12.0  # and the sum of what exceeds it that proves decline.
_DECLINE_AT_MOST = 8.0  # What one evaluation can add, so that it takes two.
_DIVERGED = 1.0  # Spreads below the worst value seen at which a NaN or infinite value is entered.
_SMALLEST_NOISE = 1e-3  # Spreads; below it differences are rounding, not noise.


@dataclass(frozen=True, slots=True)
class KneeDecision:
    """What is known about the knee after an evaluation."""

    state: Literal["improving", "plateau", "confirmed"]
    knee_step: int | None
    """Step of the evaluation to go back to; None while improving, or if no evaluation gave a finite value."""
    confirmed_at: int | None
    """Step of the evaluation that confirmed the knee; None until then."""
    reason: str
    """One sentence with the numbers that decided."""


class KneeDetector:
    """Watches validation metrics and finds the last evaluation worth keeping."""

    def __init__(self, orientations: Mapping[str, bool], *, patience: int, min_points: int) -> None:
        """Watch the metrics of `orientations`, which maps each to whether a higher value is better.

        Args:
            orientations: metrics that vote; others are ignored.
            patience: evaluations after the candidate without a gain before it is confirmed.
            min_points: evaluations before anything is confirmed.

        Raises:
            ValueError: if there is no metric, or a count is below 1.
        """
        if not orientations or patience < 1 or min_points < 1:
            got = f"{len(orientations)} metrics, patience {patience}, min_points {min_points}"
            raise ValueError(f"knee: got {got}; expected at least 1 of each; fix: `knee.metrics`, `knee.patience`, `knee.min_points`")
        self._signs = {name: 1.0 if higher else -1.0 for name, higher in orientations.items()}
        self._patience, self._min_points = patience, min_points
        self._steps: list[int] = []
        self._rows: list[list[float]] = []
        self._decision = KneeDecision("improving", None, None, "no evaluation yet")

    def update(self, step: int, values: Mapping[str, float]) -> KneeDecision:
        """Take one evaluation and decide; once confirmed, the decision stays.

        Metrics may be missing; an evaluation without any is passed over. NaN and infinity count as divergence, a decline.

        Raises:
            ValueError: if `step` does not exceed the step before.
        """
        if self._steps and step <= self._steps[-1]:
            raise ValueError(f"knee: got step {step} after {self._steps[-1]}; expected ascending steps; fix: feed each evaluation once")
        if not any(name in values for name in self._signs):
            return self._decision
        self._steps.append(step)
        self._rows.append([_entry(sign, values.get(name)) for name, sign in self._signs.items()])
        if self._decision.state != "confirmed":
            self._decision = self._decide()
        return self._decision

    def conclude(self) -> KneeDecision:
        """Decide now that training has ended: without a confirmed knee, the candidate on the whole curve is taken."""
        if self._decision.state == "confirmed" or not self._steps:
            return self._decision
        candidate = _Curve(np.array(self._rows)).candidate()
        if candidate is None:
            return KneeDecision("improving", None, None, "no evaluation gave a finite value")
        step = self._steps[candidate]
        reason = f"not confirmed when training ended; step {step} is the earliest evaluation within noise of the best"
        return KneeDecision(self._decision.state, step, None, reason)

    def _decide(self) -> KneeDecision:
        curve, now = _Curve(np.array(self._rows)), self._steps[-1]
        candidate, onset = curve.candidate(), curve.decline_onset()
        if candidate is None:
            return KneeDecision("improving", None, None, "no evaluation gave a finite value")
        since, enough = len(self._steps) - 1 - candidate, len(self._steps) >= self._min_points
        step, within = self._steps[candidate], f"within {curve.standard_error:.3f} spreads of the best"
        if onset is not None and enough:
            before = _Curve(np.array(self._rows[: onset + 1]))  # On its own, so that the decline does not pull down its end.
            chosen = before.candidate()
            step = self._steps[candidate if chosen is None else chosen]
            noise = f"within {before.standard_error:.3f} spreads of the best"
            reason = f"decline since step {self._steps[onset]}; step {step} is the earliest {noise} before it"
            return KneeDecision("confirmed", step, now, reason)
        slope, error = curve.slope(max(_SHORTEST_WINDOW, since + 1))
        margin = _ONE_SIDED_1_PERCENT * error
        if since < 2:
            return KneeDecision(
                "improving", None, None, f"gains {slope:.2g} +- {margin:.2g} spreads an evaluation; the best is {since} old"
            )
        promise = (slope + margin) * self._patience
        flat = f"step {step} is the earliest {within}; {since} evaluations since, {self._patience} more promise at most {promise:.2g}"
        if since >= self._patience and enough and promise <= curve.negligible_gain:
            return KneeDecision("confirmed", step, now, flat)
        return KneeDecision("plateau", step, None, flat)


def decide_from_history(
    orientations: Mapping[str, bool], points: Iterable[tuple[int, Mapping[str, float]]], *, patience: int, min_points: int
) -> KneeDecision:
    """Replay the evaluations of a finished stage, (step, values) in order, and conclude."""
    detector = KneeDetector(orientations, patience=patience, min_points=min_points)
    for step, values in points:
        detector.update(step, values)
    return detector.conclude()


class _Curve:
    """The composite of all metrics over the evaluations so far, in spreads of its own history."""

    def __init__(self, rows: Array) -> None:
        """Reduce oriented metrics (evaluations, metrics) to one curve with a noise scale."""
        self.usable = np.isfinite(rows).any(axis=1)
        self.values = _composite(rows)
        self.residuals = _residuals(np.where(np.isneginf(rows).any(axis=1), np.nan, self.values))
        distance = np.abs(np.subtract.outer(np.arange(len(rows)), np.arange(len(rows))))
        weights = _SMOOTHING**distance
        weights /= weights.sum(axis=1, keepdims=True)
        self.smooth = weights @ self.values
        best = int(np.argmax(self.smooth))
        self.noise = self._noise(len(rows))
        self.standard_error = self.noise * float(np.linalg.norm(weights[best]))

    def candidate(self) -> int | None:
        """Return the earliest evaluation within one standard error of the best, or None if none is finite."""
        allowed = np.flatnonzero(self.usable)
        heights = self.smooth[allowed]
        return next((int(i) for i in allowed if self.smooth[i] >= heights.max() - self.standard_error), None)

    def decline_onset(self) -> int | None:
        """Return the last evaluation before a proven decline (Page-Hinkley), or None. Source: method.md 4.5 (iv), (vi)."""
        excess, onset = 0.0, 0
        best = average = self.values[0]
        for i in range(1, len(self.values)):
            if i >= 5:  # Three residuals: fewer say nothing about the noise.
                shortfall = (best - self.values[i]) / self._noise(i) - _DECLINE_ALLOWANCE
                excess = max(0.0, excess + min(shortfall, _DECLINE_AT_MOST))
            onset = i if excess == 0 else onset
            average += 0.3 * (self.values[i] - average)
            best = max(best, average)
        return onset if excess > _DECLINE_ALARM else None

    def slope(self, window: int) -> tuple[float, float]:
        """Return the least-squares slope an evaluation over the last `window` evaluations, and its standard error."""
        tail = self.values[-window:]
        n = len(tail)
        if n < 2:
            return 0.0, 0.0
        offsets = np.arange(n) - (n - 1) / 2
        return float(offsets @ tail / (offsets @ offsets)), self.noise / sqrt(offsets @ offsets)

    @property
    def negligible_gain(self) -> float:
        """Gain of the composite that is not worth waiting for."""
        low, high = np.quantile(self.values, (0.1, 0.9))
        return max(_NEGLIGIBLE_GAIN[0] * float(high - low), _NEGLIGIBLE_GAIN[1] * self.noise)

    def _noise(self, until: int) -> float:
        """Return the deviation of the last one-step residuals of evaluations before `until`."""
        known = self.residuals[:until]
        recent = np.abs(known[np.isfinite(known)][-_RECENT_RESIDUALS:])
        if not len(recent):
            return _SMALLEST_NOISE
        # The mean is steadier than the median where there are few; cut at three medians, a jump of an untrained network does not sway it.
        typical = float(np.minimum(recent, 3 * np.median(recent)).mean())
        return max(_SMALLEST_NOISE, sqrt(pi / 2) * typical)


def _entry(sign: float, value: float | None) -> float:
    """Return the oriented value: NaN if missing, -inf if diverged."""
    if value is None:
        return float("nan")
    return sign * float(value) if np.isfinite(value) else float("-inf")


def _composite(rows: Array) -> Array:
    """Average the metrics of each evaluation, each scaled as (Y - median) / (p90 - p10). Source: method.md 4.3."""
    scaled = np.full_like(rows, np.nan)
    for column, series in enumerate(rows.T):
        finite = np.isfinite(series)
        known = series[finite]
        worst = 0.0
        if len(known):
            low, middle, high = np.quantile(known, (0.1, 0.5, 0.9))
            spread = high - low if high > low else float(np.ptp(known))
            constant = spread <= 1e-12 * np.abs(known).max()
            scaled[finite, column] = 0.0 if constant else (known - middle) / spread
            worst = float(scaled[finite, column].min())
        scaled[np.isneginf(series), column] = worst - _DIVERGED
    return np.asarray(np.nanmean(scaled, axis=1))


def _residuals(values: Array) -> Array:
    """Return, at each evaluation, its distance from the line through the three before, scaled to unit noise; NaN where fewer."""
    residuals = np.full_like(values, np.nan)
    if len(values) > 3:
        line = (4 * values[2:-1] + values[1:-2] - 2 * values[:-3]) / 3
        residuals[3:] = (values[3:] - line) / sqrt(1 + 21 / 9)
    return residuals
