"""Which expert boundaries Ray Tune tries next: it moves one boundary at a time, so that most experts are trained already.

A trial costs as many expert trainings as it has intervals that no trial had before. A boundary that moves between its neighbours leaves
all experts but two as they were, one that moves past a neighbour all but three; where another trial had a boundary it costs less still.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search.optuna import OptunaSearch

from linearsr.experts import intervals
from linearsr.partition import CutGrid, Proposal
from linearsr_platform.errors import UserError

Offsets = tuple[int, ...]
"""Ascending places of the cuts on the grid, as `CutGrid.boundaries` takes them."""
Interval = tuple[float, float]

_STUDY = "boundaries"
_SEED_STRIDE = 1_000_003
_EXPERTS = "experts"
_ENQUEUED = "fixed_params"  # Where Optuna keeps the parameters of a trial that is not for the sampler to choose.


def boundaries_of(config: Mapping[str, int], grid: CutGrid) -> tuple[float, ...]:
    """Return the ascending noise levels that a trial's config stands for; () for one expert."""
    return grid.boundaries(_offsets(config))


def _offsets(config: Mapping[str, int]) -> Offsets:
    experts = config[_EXPERTS]
    return tuple(sorted(config[_cut(index, experts)] for index in range(experts - 1)))


def _config(offsets: Offsets) -> dict[str, int]:
    experts = len(offsets) + 1
    return {_EXPERTS: experts, **{_cut(index, experts): offset for index, offset in enumerate(offsets)}}


def _cut(index: int, experts: int) -> str:
    """Name a parameter by its number of experts too, for the second of three cuts lies elsewhere than the second of five."""
    return f"cut_{index + 1}_of_{experts - 1}"


@dataclass(frozen=True, kw_only=True)
class BoundarySpace:
    """The parameters of a trial: how many experts, and where on the grid each cut between them lies."""

    grid: CutGrid
    experts: tuple[int, ...]
    """Allowed numbers of experts."""

    def __call__(self, trial: Any) -> None:
        """Ask an Optuna trial for its parameters."""
        experts = trial.suggest_categorical(_EXPERTS, self.experts)
        for index in range(experts - 1):
            trial.suggest_int(_cut(index, experts), 0, self.grid.slack(experts))

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return the parameters of all allowed numbers of experts; a trial has those of one."""
        cuts = {_cut(index, count): IntDistribution(0, self.grid.slack(count)) for count in self.experts for index in range(count - 1)}
        return {_EXPERTS: CategoricalDistribution(self.experts), **cuts}

    def intervals(self, offsets: Offsets) -> frozenset[Interval]:
        """Return the noise levels of each expert, the key of its training."""
        return frozenset(intervals(self.grid.boundaries(offsets)))

    def moves(self, offsets: Offsets, index: int, *, far: bool) -> dict[int, Offsets]:
        """Return where cut `index` may move alone: its new place, counted as its own offset, and the offsets of all cuts then.

        Args:
            offsets: Ascending.
            index: Of the cut that moves.
            far: Whether it may pass its neighbours, whose own offsets then change although they stay where they are.
        """
        slack = self.grid.slack(len(offsets) + 1)
        if not far:
            low, high = (0, *offsets)[index], (*offsets, slack)[index + 1]
            return {place: (*offsets[:index], place, *offsets[index + 1 :]) for place in range(low, high + 1)}
        width = self.grid.slack(len(offsets)) - slack  # Least steps between two cuts.
        others = [offset + i * width for i, offset in enumerate(offsets) if i != index]
        found = {}
        for cut in range(slack + (len(offsets) - 1) * width + 1):
            if all(abs(cut - other) >= width for other in others):
                found[cut - index * width] = tuple(each - i * width for i, each in enumerate(sorted([*others, cut])))
        return found


@dataclass(frozen=True, kw_only=True)
class _History:
    """What earlier trials tell the sampler."""

    tried: frozenset[Offsets]
    trained: frozenset[Interval]
    ranked: tuple[Offsets, ...]
    """Those with a score, best first."""


class OneBoundarySampler(BaseSampler):
    """Moves one boundary of a good trial to where Optuna's TPE wants it, or near there where fewer experts need training.

    Nothing is tried twice while a trial that was tried has an untried neighbour. Failed and running trials count as tried.
    The defaults are a compromise measured by tests/benchmarks/search/proposals_vs_random.py: near moves are cheap, moves past a
    neighbour keep the search from getting stuck, and moving everything helps little but can change the number of experts.
    Source: Bergstra et al. 2011 (TPE); method.md 5.5 (coordinate search, retraining only the two adjacent experts).
    """

    def __init__(
        self,
        space: BoundarySpace,
        *,
        seed: int,
        all_moving: float = 0.05,
        far: float = 0.2,
        best_first: float = 0.8,
        draws: int = 3,
        window: float = 1.5,
        reach: float = 1.5,
        start_after: int = 5,
    ) -> None:
        """Search `space`.

        Args:
            space: Allowed boundaries.
            seed: Of everything random.
            all_moving: Share of trials in which all boundaries move and the number of experts may change.
            far: Share of the others in which the boundary may pass its neighbours.
            best_first: Probability that the best trial is moved from; else the second is with the same probability, and so on.
            draws: Moves to choose the cheapest from.
            window: How far a boundary that does not pass its neighbours moves, log-SNR.
            reach: How much farther, log-SNR, from where TPE wants it a boundary may go to save one training.
            start_after: Trials with a score before which all boundaries move.
        """
        self._space, self._all_moving, self._far, self._best_first, self._draws = space, all_moving, far, best_first, draws
        self._window, self._reach, self._start_after = max(1, round(window / space.grid.step)), reach / space.grid.step, start_after
        self._rng = np.random.default_rng(seed)
        # Optuna takes 32 bits.
        self._tpe = TPESampler(seed=seed % (1 << 32), n_startup_trials=start_after)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return all parameters: none is drawn without regard to the others."""
        return self._space.distributions()

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        """Draw one parameter by TPE."""
        return self._tpe.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """Return the parameters of the next trial; none for a warm start, which has its own."""
        if _ENQUEUED in trial.system_attrs:
            return {}
        history = self._history(study, trial)
        if len(history.ranked) < self._start_after or self._rng.random() < self._all_moving:
            drawn = [self._scatter(study, trial) for _ in range(self._draws)]
        else:
            index = min(int(self._rng.geometric(self._best_first)) - 1, len(history.ranked) - 1)
            far = bool(self._rng.random() < self._far)
            drawn = [self._move(study, trial, history, history.ranked[index], far=far) for _ in range(self._draws)]
        untried = [offsets for offsets in drawn if offsets not in history.tried] or [self._any_untried(history)]
        return _config(min(untried, key=lambda offsets: self._cost(history, offsets)))

    def _history(self, study: Study, trial: FrozenTrial) -> _History:
        """Read the other trials, those that wait to be warm starts included."""
        sign = 1 if study.direction == StudyDirection.MAXIMIZE else -1
        tried, trained, scored = set(), set[Interval](), []
        for other in study.get_trials(deepcopy=False):
            config = other.params or other.system_attrs.get(_ENQUEUED)
            if other.number == trial.number or not config:
                continue
            offsets = _offsets(config)
            tried.add(offsets)
            if other.state == TrialState.FAIL:
                continue
            trained |= self._space.intervals(offsets)
            reports = other.intermediate_values
            score = other.value if other.state == TrialState.COMPLETE else reports[max(reports)] if reports else None
            if score is not None and isfinite(score):
                # Who was stopped at a rung has not passed it, so by rungs passed scores are compared only where training was equal.
                scored.append(((len(reports), sign * score), offsets))
        scored.sort(key=lambda each: each[0], reverse=True)
        return _History(tried=frozenset(tried), trained=frozenset(trained), ranked=tuple(offsets for _, offsets in scored))

    def _scatter(self, study: Study, trial: FrozenTrial) -> Offsets:
        """Draw the number of experts and all boundaries."""
        experts = self._tpe.sample_independent(study, trial, _EXPERTS, CategoricalDistribution(self._space.experts))
        anywhere = IntDistribution(0, self._space.grid.slack(experts))
        return tuple(sorted(self._tpe.sample_independent(study, trial, _cut(index, experts), anywhere) for index in range(experts - 1)))

    def _move(self, study: Study, trial: FrozenTrial, history: _History, start: Offsets, *, far: bool) -> Offsets:
        """Draw a boundary and where it goes, or return `start` if it can go nowhere new."""
        if not start:
            return start
        index = int(self._rng.integers(len(start)))
        moves = self._space.moves(start, index, far=far)
        untried = {place: offsets for place, offsets in moves.items() if offsets not in history.tried}
        if not untried:
            return start
        if far:
            low, high = 0, self._space.grid.slack(len(start) + 1)
        else:
            low, high = max(min(moves), start[index] - self._window), min(max(moves), start[index] + self._window)
        wanted = self._tpe.sample_independent(study, trial, _cut(index, len(start) + 1), IntDistribution(low, high))
        return untried[min(untried, key=lambda place: (abs(place - wanted) + self._reach * self._cost(history, untried[place]), place))]

    def _any_untried(self, history: _History) -> Offsets:
        """Return an untried neighbour of the best trial that has one; the best trial again once everything has been tried."""
        known = [*history.ranked, *sorted(history.tried)]
        for start in known:
            moves = [move for index in range(len(start)) for move in self._space.moves(start, index, far=False).values()]
            untried = [move for move in moves if move not in history.tried]
            if untried:
                return untried[int(self._rng.integers(len(untried)))]
        return known[0]

    def _cost(self, history: _History, offsets: Offsets) -> int:
        """Return how many experts need training."""
        return len(self._space.intervals(offsets) - history.trained)


def warm_starts(space: BoundarySpace, proposals: Sequence[Proposal]) -> list[dict[str, int]]:
    """Return the configs of the proposals that have an allowed number of experts, on the grid, in their order and each once."""
    allowed = [one.boundaries for one in proposals if len(one.boundaries) + 1 in space.experts]
    return [_config(offsets) for offsets in dict.fromkeys(space.grid.offsets(boundaries) for boundaries in allowed)]


@dataclass(frozen=True, kw_only=True)
class PastTrial:
    """A trial of an attempt that was interrupted."""

    config: Mapping[str, int]
    scores: tuple[float, ...]
    """At the rungs it has reached."""
    ended: bool
    """Whether it is through: finished, stopped or failed."""


def boundary_search(
    grid: CutGrid,
    experts: Sequence[int],
    proposals: Sequence[Proposal],
    *,
    metric: str,
    mode: Literal["max", "min"],
    seed: int,
    history: Sequence[PastTrial] = (),
) -> OptunaSearch:
    """Return a searcher for Ray Tune that tries the proposals first, then moves one boundary at a time.

    Trials' configs are flat, `{"experts": 4, "cut_1_of_3": 17, ...}`; `boundaries_of` reads them.

    Args:
        grid: Where boundaries may lie.
        experts: Allowed numbers of experts, often one.
        proposals: Tried in this order; those with another number of experts are left out.
        metric: Key of the score in what trials report.
        mode: Whether a higher score is better.
        seed: Of everything random; the same seed, history and scores give the same trials.
        history: Of earlier attempts, in order: what has ended is known from the start, what has not comes before anything new.

    Raises:
        UserError: if there is no number of experts to try.
        ValueError: if that many experts do not fit on the grid.
    """
    if not experts or min(experts) < 1:
        raise UserError(f"search.experts: got {list(experts)}; expected at least one number from 1; fix: `search.experts`")
    space = BoundarySpace(grid=grid, experts=tuple(dict.fromkeys(experts)))
    space.distributions()  # Refuses experts that do not fit before anything starts.
    # Otherwise Optuna announces the study on stderr in the middle of Tune's progress.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name=_STUDY, direction="maximize" if mode == "max" else "minimize")
    for past in history:
        if past.ended:
            study.add_trial(_past(past, space))
        else:
            study.enqueue_trial(dict(past.config))
    known = [_offsets(past.config) for past in history]
    for config in warm_starts(space, proposals):
        if _offsets(config) not in known:
            study.enqueue_trial(config)
    # Not the same draws again after an interruption.
    sampler = OneBoundarySampler(space, seed=seed + _SEED_STRIDE * len(history))
    return OptunaSearch(space, metric=metric, mode=mode, sampler=sampler, storage=storage, study_name=_STUDY)


def _past(past: PastTrial, space: BoundarySpace) -> FrozenTrial:
    """Return a trial that has ended as Optuna keeps it."""
    every = space.distributions()
    scored = bool(past.scores) and isfinite(past.scores[-1])
    return optuna.trial.create_trial(
        state=TrialState.COMPLETE if scored else TrialState.FAIL,
        value=past.scores[-1] if scored else None,
        params=dict(past.config),
        distributions={name: every[name] for name in past.config},
        # Without the last: Tune too keeps the score that ends a trial from its reports, and trials are ranked by how many those are.
        intermediate_values=dict(enumerate(past.scores[:-1], start=1)),
    )
