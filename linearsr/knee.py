"""When a training stage has reached its knee (ESGF), decided online from its validation metrics. Imports no torch.

The knee is the last good evaluation before the curves begin to oscillate or to decline. It is confirmed when that is proven, so a
plateau alone is no knee yet. Every decision uses only the evaluations seen so far, and every quantity is in units of the metrics' own
history, so the same detector serves any metric; feeding the same points again gives the same decisions.

How several metrics become one decision: the evidence of all of them is added, and where there are three or more it must suffice
without any single one (`linearsr.onset`); which evaluation is kept is decided on the mean of the metrics, each in units of its own spread
(`linearsr.selection`). Time is counted in evaluations, so irregular steps do no harm.
Source: LinearSR, early-stopping guided fine-tuning; method.md part 4.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from linearsr.config import MIN_POINTS
from linearsr.onset import Onset, OnsetSearch
from linearsr.scatter import Array
from linearsr.selection import SURE, UNSURE, composite, earliest_best, selection_interval, smoothed

State = Literal["improving", "plateau", "confirmed", "diverging"]

_RISING = 1.64  # Standard errors of the recent slope from which the curves still rise, one-sided 5 %.
_SETTLED = 2  # Evaluations after the best one before anything is called a plateau.
_MARGIN = 0.15  # Share of the evaluations before the onset that are not chosen from, because its date is uncertain.
_SUSPECTED = 0.2  # Share of a proof that, once training has ended, is enough not to choose from what it speaks against.
_OWN_PROOF = 1.5  # Log-likelihood ratio from which a single metric is said to have got worse.
_MUCH = 6.0  # Noise units that must have been gained before their loss is divergence.
_BROKEN = 2  # Evaluations without finite values that mean divergence.


@dataclass(frozen=True, slots=True)
class MetricVerdict:
    """What one metric by itself says."""

    state: State
    best_step: int | None
    """Step of the best of its smoothed values; None if it has none."""
    onset_step: int | None
    """Last evaluation before it oscillated or declined; None if it does neither."""


@dataclass(frozen=True, slots=True)
class KneeDecision:
    """What is known about the knee after an evaluation."""

    state: State
    knee_step: int | None
    """Step of the evaluation to go back to; None while improving. On a plateau it may still change."""
    confirmed_at: int | None
    """Step of the evaluation that confirmed the knee, or showed that training diverges; None until then."""
    onset_step: int | None
    """Last evaluation before oscillation or decline; None until confirmed."""
    interval: tuple[int, int] | None
    """Steps between which `knee_step` falls in 90 % of bootstrap draws; None where it is, and for a plateau until `conclude`."""
    reason: str
    """One sentence with the numbers that decided."""
    metrics: dict[str, MetricVerdict] = field(default_factory=dict)
    """Of each metric; empty for a plateau or a rise until `conclude`."""

    @property
    def final(self) -> bool:
        """Whether it stays whatever comes after."""
        return self.state in ("confirmed", "diverging")

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "interval": None if self.interval is None else list(self.interval)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "KneeDecision":
        """Read what `to_json` returned."""
        interval = None if value["interval"] is None else (int(value["interval"][0]), int(value["interval"][1]))
        return cls(**{**value, "interval": interval, "metrics": {name: MetricVerdict(**each) for name, each in value["metrics"].items()}})


class KneeDetector:
    """Watches validation metrics and finds the last evaluation worth keeping."""

    def __init__(self, orientations: Mapping[str, bool], *, min_points: int = MIN_POINTS, patience: int | None = None) -> None:
        """Watch the metrics of `orientations`, which maps each to whether a higher value is better.

        Args:
            orientations: metrics that vote; others are ignored.
            min_points: evaluations before anything is confirmed.
            patience: evaluations on a plateau that confirm the knee although nothing got worse; None waits as long as it takes.

        Raises:
            ValueError: if there is no metric, or a count is below 1.
        """
        if not orientations or min_points < 1 or (patience is not None and patience < 1):
            got = f"{len(orientations)} metrics, patience {patience}, min_points {min_points}"
            raise ValueError(f"knee: got {got}; expected at least 1 of each; fix: `knee.metrics`, `knee.patience`, `knee.min_points`")
        self._signs = {name: 1.0 if higher else -1.0 for name, higher in orientations.items()}
        self._min_points, self._patience = max(MIN_POINTS, min_points), patience
        self._steps: list[int] = []
        self._search = OnsetSearch()
        self._broken: list[bool] = []
        self._onset: Onset | None = None
        self._decision = KneeDecision("improving", None, None, None, None, "no evaluation yet")

    def update(self, step: int, values: Mapping[str, float]) -> KneeDecision:
        """Take one evaluation and decide; once confirmed or diverging, the decision stays.

        Metrics may be missing; an evaluation without any is passed over. One with NaN or infinity in at least half of its metrics
        is broken, and two of these in a row mean divergence; otherwise such a value counts as missing.

        Raises:
            ValueError: if `step` does not exceed the step before.
        """
        if self._steps and step <= self._steps[-1]:
            raise ValueError(f"knee: got step {step} after {self._steps[-1]}; expected ascending steps; fix: feed each evaluation once")
        row = np.array([sign * float(values.get(name, np.nan)) for name, sign in self._signs.items()])
        present = sum(name in values for name in self._signs)
        if not present:
            return self._decision
        finite = np.isfinite(row)
        broken = 2 * int(finite.sum()) <= present
        self._steps.append(step)
        self._broken.append(broken)
        self._search.append(np.where(finite & (not broken), row, np.nan))
        if not self._decision.final:
            self._onset = self._search.strongest()
            self._decision = self._decide()
        return self._decision

    def conclude(self) -> KneeDecision:
        """Decide now that training has ended, with the interval and what each metric says."""
        decision = self._decision
        if decision.final or not self._steps:
            return decision
        if decision.knee_step is None:
            return replace(decision, metrics=self._verdicts(None))
        last = self._last_trusted()
        knee = earliest_best(self._search.values[: last + 1], UNSURE)
        if knee is None:
            return decision
        reason = f"nothing got worse by the end; step {self._steps[knee]} is the earliest evaluation within noise of the best"
        interval = self._interval(knee, last, last)
        return replace(decision, knee_step=self._steps[knee], interval=interval, reason=reason, metrics=self._verdicts(None))

    def best_step(self) -> int | None:
        """Return whose weights to keep if training ended now: the knee's, or else the earliest within noise of the best."""
        if self._decision.final or not self._steps:
            return self._decision.knee_step
        best = earliest_best(self._search.values[: self._last_trusted() + 1], UNSURE)
        return None if best is None else self._steps[best]

    def candidates(self, limit: int) -> list[int]:
        """Return the steps that a later confirmation may still choose, the likeliest first; the knee alone once it is known.

        They are three quarters of `limit` at most, of those whose weights there is room for. The rest is for others, thinned out: on a
        long plateau the choice may fall on a step that was none of these before.
        """
        best = self.best_step()
        if best is None or self._decision.final:
            return self._steps[-1:] if best is None else [best]
        now, values = len(self._steps) - 1, self._search.values
        chosen = [best, self._steps[now]]
        # A later onset cuts the curve somewhere after the look-back; each cut has its own choice.
        for cut in range(now, max(now - 2 * limit, 1), -1):
            index = earliest_best(values[:cut], SURE)
            chosen += [] if index is None else [self._steps[index]]
        return list(dict.fromkeys(chosen))[: limit * 3 // 4]

    def _decide(self) -> KneeDecision:
        """Decide after an evaluation."""
        now, onset = len(self._steps) - 1, self._onset
        diverged = self._last_before_broken()
        if diverged is not None:
            return self._final("diverging", diverged, diverged, "no finite values", None)
        if now + 1 < self._min_points:
            return KneeDecision("improving", None, None, None, None, f"{now + 1} evaluations; at least {self._min_points} are needed")
        if onset is not None and onset.score >= 1:
            kept = max(0, min(onset.earliest, int(onset.index * (1 - _MARGIN))))
            what = f"{onset.kind} (evidence {onset.score:.1f} times what is asked for)"
            return self._final("diverging" if self._collapsed(onset.index) else "confirmed", onset.index, kept, what, onset.shares)
        rise = self._search.rises()
        best = earliest_best(self._search.values, UNSURE)
        if best is None or rise > _RISING or now - best < _SETTLED:
            age = "" if best is None else f"; the best is {now - best} evaluations old"
            return KneeDecision("improving", None, None, None, None, f"rises by {rise:.1f} standard errors{age}")
        evidence = 0.0 if onset is None else max(0.0, onset.score)
        reason = f"no rise ({rise:.1f} standard errors) for {now - best} evaluations, {evidence:.0%} of the evidence that it got worse"
        if self._patience is not None and now - best >= self._patience:
            interval = self._interval(best, now, now)
            return KneeDecision("confirmed", self._steps[best], self._steps[now], None, interval, reason, self._verdicts(None))
        return KneeDecision("plateau", self._steps[best], None, None, None, reason)

    def _final(self, state: State, onset: int, kept: int, what: str, shares: Array | None) -> KneeDecision:
        """Build the decision that stays: something got worse after the evaluation `onset`, and one up to `kept` is chosen."""
        knee = earliest_best(self._search.values[: kept + 1], SURE)
        if knee is None:
            return KneeDecision(state, None, self._steps[-1], self._steps[onset], None, "no evaluation gave a finite value")
        reason = f"{what} after step {self._steps[onset]}; step {self._steps[knee]} is the earliest within noise of the best before it"
        interval = self._interval(knee, kept, onset)
        verdicts = self._verdicts(shares, onset)
        return KneeDecision(state, self._steps[knee], self._steps[-1], self._steps[onset], interval, reason, verdicts)

    def _last_before_broken(self) -> int | None:
        """Return the last good evaluation if all since are broken and there are enough of them."""
        if len(self._steps) < _BROKEN or not all(self._broken[-_BROKEN:]):
            return None
        return max((index for index, broken in enumerate(self._broken) if not broken), default=0)

    def _collapsed(self, onset: int) -> bool:
        """Return whether the evaluations after the onset lie under the very first one, where much had been gained: all of it is lost."""
        if self._search.gain(onset) < _MUCH:
            return False
        curve = composite(self._search.values)
        after, known = curve[onset + 1 :], curve[np.isfinite(curve)]
        return bool(np.isfinite(after).any()) and float(np.nanmean(after)) < known[0]

    def _last_trusted(self) -> int:
        """Return the last evaluation to choose from if training ended now."""
        onset, now = self._onset, len(self._steps) - 1
        if onset is None or onset.score < _SUSPECTED:
            return now
        return max(0, min(onset.earliest, int(onset.index * (1 - _MARGIN))))

    def _interval(self, knee: int, earliest: int, latest: int) -> tuple[int, int]:
        """Return the bootstrap interval in steps; it holds the knee itself."""
        low, high = selection_interval(self._search.values, min(earliest, latest), latest)
        return self._steps[min(low, knee)], self._steps[max(high, knee)]

    def _verdicts(self, shares: Array | None, onset: int | None = None) -> dict[str, MetricVerdict]:
        """Say for each metric whether it rises, rests or got worse."""
        values, rises = self._search.values, self._search.rises_each()
        verdicts = {}
        for column, name in enumerate(self._signs):
            worse = onset is not None and (shares is None or shares[column] >= _OWN_PROOF)
            # At its end a smoothed curve leans on the past alone, so where it got worse what came after does not compete.
            smooth = smoothed(values[: onset + 1 if worse and onset is not None else None, column])
            best = int(np.nanargmax(smooth)) if np.isfinite(smooth).any() else None
            state: State = "confirmed" if worse else "improving" if rises[column] > _RISING else "plateau"
            verdicts[name] = MetricVerdict(
                state, None if best is None else self._steps[best], self._steps[onset] if worse and onset is not None else None
            )
        return verdicts


def decide_from_history(
    orientations: Mapping[str, bool],
    points: Iterable[tuple[int, Mapping[str, float]]],
    *,
    min_points: int = MIN_POINTS,
    patience: int | None = None,
) -> KneeDecision:
    """Replay the evaluations of a finished stage, (step, values) in order, and conclude."""
    detector = KneeDetector(orientations, min_points=min_points, patience=patience)
    for step, values in points:
        detector.update(step, values)
    return detector.conclude()
