"""Successive halving at rungs of our choice, which knows what was scored before an interruption."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

from ray.tune.schedulers.async_hyperband import AsyncHyperBandScheduler, _Bracket

from linearsr_platform.errors import UserError

STEPS = "steps"
"""The key of a trial's results that says how many optimizer steps it has trained, all experts together."""


class _Rungs(_Bracket):
    """The records of who scored what at each rung, and Ray's rule for who stops there."""

    def __init__(self, rungs: Sequence[int], reduction: float) -> None:
        self.rf = reduction
        self._stop_last_trials = False  # Also makes the rule decide once for each trial and rung, however often it is reported.
        self._rungs = [(float(steps), {}) for steps in reversed(rungs)]

    def record(self, trial: str, scores: Mapping[int, float]) -> None:
        """Record what a trial scored in an earlier attempt, without deciding anything again."""
        for steps, recorded in self._rungs:
            if steps in scores:
                recorded[trial] = scores[int(steps)]


class RungScheduler(AsyncHyperBandScheduler):
    """Asynchronous successive halving: a trial that is not among the best `1 / reduction` of a rung stops there.

    It differs from Ray's scheduler in two points, both of which leave Ray's decision alone, hence a subclass: rungs need not
    form a geometric series, and it can start with what trials of an interrupted attempt have scored, without which the first trials
    after it would be judged against nobody. At the last rung nothing is decided: who gets there is done.
    Source: Li et al. 2020 (ASHA); method.md 5.5.
    """

    def __init__(
        self,
        rungs: Sequence[int],
        *,
        metric: str,
        mode: Literal["max", "min"],
        reduction: float,
        history: Mapping[str, Mapping[int, float]],
    ) -> None:
        """See `rung_scheduler`, which checks the arguments."""
        super().__init__(
            time_attr=STEPS,
            metric=metric,
            mode=mode,
            max_t=rungs[-1],
            grace_period=rungs[0],
            reduction_factor=reduction,
            stop_last_trials=False,
        )
        sign = 1.0 if mode == "max" else -1.0
        records = _Rungs(rungs[:-1], reduction)
        for trial, scores in history.items():
            records.record(trial, {steps: sign * score for steps, score in scores.items()})
        self._brackets = [records]


def rung_scheduler(
    rungs: Sequence[int],
    *,
    metric: str,
    mode: Literal["max", "min"],
    reduction: float,
    history: Mapping[str, Mapping[int, float]] | None = None,
) -> RungScheduler:
    """Return a scheduler that stops all but the best `1 / reduction` of the trials at each rung but the last.

    Args:
        rungs: ascending optimizer steps at which trials report, all experts together, the last being the end.
        metric: key of the score in what trials report; they report `steps` beside it.
        mode: whether a higher score is better.
        reduction: above 1; 2 stops the worse half.
        history: scores of trials that have ended in an earlier attempt, by steps.

    Raises:
        UserError: if there are no rungs, or they do not ascend, or `reduction` is not above 1.
    """
    if not rungs or rungs[0] < 1 or any(late <= early for early, late in pairwise(rungs)):
        raise UserError(f"search.rungs: got {list(rungs)}; expected ascending steps from 1; fix: `search.rungs`")
    if reduction <= 1:
        raise UserError(f"search.reduction: got {reduction}; expected a number above 1; fix: `search.reduction`")
    return RungScheduler(rungs, metric=metric, mode=mode, reduction=reduction, history=history or {})
