"""Stopping rules that the knee detector is measured against. Use from this folder: `import rivals`.

Every rule sees one composite of all metrics: oriented so that higher is better, each metric scaled as (Y - median) / (p90 - p10), and
averaged over the metrics an evaluation has. The scale is causal: at evaluation i it comes from evaluations 0..i, and the whole history is
written in it, so values that are compared share a scale. A value that is not finite enters one spread under the worst of its metric.
Evaluations without any value are passed over; none of the rules counts them.

Prechelt's criteria want an error that is positive and has a zero, which a scale-free composite has not. Here the error is 2 at the worst
evaluation so far and 1 at the best: training has halved it. So `GL 5 %` stops 5 % of the range of the curve under its best.
"""

from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import isnan

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Points = list[tuple[int, dict[str, float]]]
Orientations = dict[str, bool]
Rule = Callable[[Points, Orientations], "Choice"]
Trigger = Callable[[Array], bool]

STRIP = 5
"""Evaluations in a strip (k of Prechelt 1998)."""


@dataclass(frozen=True)
class Choice:
    """What a rule would have done, in steps."""

    selected: int | None
    """Step whose checkpoint it restores; None if the curve has no value."""
    stopped_at: int | None
    """Step at which it ends training; None if it never does, or chooses in hindsight."""


def patience(points: Points, orientations: Orientations, *, evaluations: int) -> Choice:
    """Stop once the best is `evaluations` old. Source: EarlyStopping of Keras and Lightning, min_delta 0, best weights restored."""
    return _online(points, orientations, lambda history: len(history) - 1 - int(history.argmax()) >= evaluations)


def generalisation_loss(points: Points, orientations: Orientations, *, percent: float) -> Choice:
    """Stop once the error is `percent` above its minimum. Source: Prechelt 1998, GL."""
    return _online(points, orientations, lambda history: _generalisation_loss(_errors(history)) > percent)


def progress_quotient(points: Points, orientations: Orientations, *, alpha: float) -> Choice:
    """Stop at the end of a strip whose generalisation loss exceeds `alpha` times its progress. Source: Prechelt 1998, PQ.

    Prechelt measures progress on the training error; curves of validation metrics have none, so it is measured on the composite's.
    """

    def trigger(history: Array) -> bool:
        if len(history) % STRIP:
            return False
        errors = _errors(history)
        strip = errors[-STRIP:]
        progress = 1000 * (strip.mean() / strip.min() - 1)
        return _generalisation_loss(errors) > alpha * progress

    return _online(points, orientations, trigger)


def successive_rises(points: Points, orientations: Orientations, *, strips: int) -> Choice:
    """Stop once the error at the end of a strip has risen `strips` times in succession. Source: Prechelt 1998, UP."""

    def trigger(history: Array) -> bool:
        ends = history[STRIP - 1 :: STRIP]
        return len(history) % STRIP == 0 and len(ends) > strips and bool(np.all(np.diff(ends[-strips - 1 :]) < 0))

    return _online(points, orientations, trigger)


def argmax(points: Points, orientations: Orientations) -> Choice:
    """Choose the best evaluation of the finished curve, in hindsight."""
    return _online(points, orientations, lambda _: False)


def kneedle(points: Points, orientations: Orientations, *, sensitivity: float = 1.0) -> Choice:
    """Choose the knee of the finished curve, in hindsight: of those Kneedle declares, the one furthest above the chord.

    The composite is smoothed with two-sided weights .5^|i - j|, steps and composite are mapped to [0, 1], and D is their difference.
    A local maximum of D is a knee if D falls below it by `sensitivity` mean gaps before D turns up again. Where none is declared the
    best evaluation is chosen.
    Source: Satopaa et al. 2011, sections III-IV.
    """
    curve = _Composite(points, orientations)
    if not curve.steps:
        return Choice(None, None)
    history = curve.history(len(curve.steps))
    best = Choice(curve.steps[int(history.argmax())], None)
    index = np.arange(len(history))
    weights = 0.5 ** np.abs(np.subtract.outer(index, index))
    smooth = weights @ history / weights.sum(axis=1)
    if len(history) < 3 or np.ptp(smooth) == 0:
        return best
    x = (np.array(curve.steps) - curve.steps[0]) / (curve.steps[-1] - curve.steps[0])
    difference = (smooth - smooth.min()) / np.ptp(smooth) - x
    knees = _declared(difference, sensitivity * float(np.diff(x).mean()))
    return Choice(curve.steps[max(knees, key=lambda i: difference[i])], None) if knees else best


def _declared(difference: Array, fall: float) -> list[int]:
    """Return the local maxima after which `difference` falls by more than `fall` before it turns up."""
    knees = []
    for i in range(1, len(difference) - 1):
        if not difference[i - 1] < difference[i] >= difference[i + 1]:
            continue
        lowest = i + 1
        while lowest + 1 < len(difference) and difference[lowest + 1] <= difference[lowest]:
            lowest += 1
        if difference[lowest] < difference[i] - fall:
            knees.append(i)
    return knees


RIVALS: dict[str, Rule] = {
    "patience 5": partial(patience, evaluations=5),
    "patience 10": partial(patience, evaluations=10),
    "patience 20": partial(patience, evaluations=20),
    "GL 5 %": partial(generalisation_loss, percent=5.0),
    "GL 20 %": partial(generalisation_loss, percent=20.0),
    "PQ 0.5": partial(progress_quotient, alpha=0.5),
    "UP 2": partial(successive_rises, strips=2),
    "UP 3": partial(successive_rises, strips=3),
    "argmax (hindsight)": argmax,
    "Kneedle (hindsight)": kneedle,
}
"""Every rule by the name tables print."""
HINDSIGHT = frozenset({"argmax (hindsight)", "Kneedle (hindsight)"})
"""Names of the rules that see the finished curve."""


def _online(points: Points, orientations: Orientations, trigger: Trigger) -> Choice:
    """Feed `trigger` the composite up to each evaluation in turn; the best so far is restored where it first says stop."""
    curve = _Composite(points, orientations)
    selected = None
    for history in curve.replay():
        selected = curve.steps[int(history.argmax())]
        if trigger(history):
            return Choice(selected, curve.steps[len(history) - 1])
    return Choice(selected, None)


def _errors(history: Array) -> Array:
    """Map a composite to errors: 1 at its best, 2 at its worst, 1 throughout if it is constant."""
    spread = np.ptp(history)
    return 1 + (history.max() - history) / (spread if spread > 0 else 1.0)


def _generalisation_loss(errors: Array) -> float:
    return 100 * float(errors[-1] / errors.min() - 1)


class _Composite:
    """All metrics of a curve as one, in the scale of any prefix of it."""

    def __init__(self, points: Points, orientations: Orientations) -> None:
        """Orient the values and find, for each prefix, each metric's centre, spread and worst finite value."""
        kept = [(step, values) for step, values in points if any(name in values for name in orientations)]
        self.steps = [step for step, _ in kept]
        signs = {name: 1.0 if higher else -1.0 for name, higher in orientations.items()}
        rows = [[sign * values[name] if name in values else np.nan for name, sign in signs.items()] for _, values in kept]
        self._values = np.array(rows, dtype=float).reshape(len(rows), len(signs))
        present = np.array([[name in values for name in signs] for _, values in kept], dtype=bool).reshape(self._values.shape)
        self._count = present.sum(axis=1)
        self._diverged = present & ~np.isfinite(self._values)
        self._values[self._diverged] = 0.0
        self._absent = ~present
        scales = [list(_scales(column)) for column in np.where(present & ~self._diverged, self._values, np.nan).T]
        self._scales = np.array(scales).reshape(len(signs), len(rows), 3)

    def history(self, length: int) -> Array:
        """Return the composite of the first `length` evaluations in their own scale."""
        centre, spread, worst = self._scales[:, length - 1].T
        scaled = (self._values[:length] - centre) / spread
        scaled = np.where(self._diverged[:length], (worst - centre) / spread - 1, scaled)
        return np.asarray(np.where(self._absent[:length], 0.0, scaled).sum(axis=1) / self._count[:length])

    def replay(self) -> Iterator[Array]:
        """Yield the history at each evaluation in turn."""
        return (self.history(length) for length in range(1, len(self.steps) + 1))


def _scales(column: Array) -> Iterator[tuple[float, float, float]]:
    """Yield median, p90 - p10 (the range if that is 0, 1 if that is too) and minimum of each prefix; NaN are not counted."""
    known: list[float] = []
    for value in column.tolist():
        if not isnan(value):
            insort(known, value)
        if not known:
            yield 0.0, 1.0, 0.0
            continue
        low, middle, high = (_quantile(known, share) for share in (0.1, 0.5, 0.9))
        spread = high - low or known[-1] - known[0] or 1.0
        yield middle, spread, known[0]


def _quantile(ascending: list[float], share: float) -> float:
    """Interpolate a quantile as numpy does."""
    position = share * (len(ascending) - 1)
    below = int(position)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (position - below) * (ascending[above] - ascending[below])
