"""One trial of a search over boundaries: its experts are trained to a rung and scored together, rung after rung."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray import tune

from linearsr.experts import training_interval
from linearsr.guard import Trip
from linearsr.partition import CutGrid
from linearsr_platform.cluster.board import ProgressBoard
from linearsr_platform.cluster.boundary_search import boundaries_of
from linearsr_platform.cluster.device import own_device
from linearsr_platform.cluster.rungs import STEPS
from linearsr_platform.cluster.scoring import Scoring
from linearsr_platform.cluster.warm import Claims, ExpertStore, Silence, train_all
from linearsr_platform.train.job import TrainJob

SCORE = "score"
"""Key of a result: mean of the search's metric over the crops."""


@dataclass(frozen=True, kw_only=True)
class TrialPlan:
    """What all trials of a search have in common; picklable."""

    store: ExpertStore
    scoring: Scoring
    grid: CutGrid
    overlap_log_snr: float
    rungs: tuple[int, ...]
    metric: str
    seed: int
    threads: int
    """Of torch in a trial's process."""
    baseline: tuple[float, ...] = ()
    """The metric of every crop restored by the network that all experts start from."""

    def jobs(self, boundaries: tuple[float, ...], steps: int, *, seed: int | None = None) -> list[TrainJob]:
        """Describe the experts between boundaries, which share `steps` evenly."""
        count = len(boundaries) + 1
        return [
            self.store.job(
                training_interval(index, boundaries, self.overlap_log_snr),
                steps=max(1, round(steps / count)),
                seed=self.seed if seed is None else seed,
            )
            for index in range(count)
        ]


class BoundaryTrial(tune.Trainable):
    """Satisfies Tune: a step is a rung. The process stays for the next trial, so that it imports torch and DeepSpeed once."""

    def setup(  # type: ignore[override]  # Tune passes what `tune.with_parameters` was given
        self, config: dict[str, Any], *, plan: TrialPlan, board: ProgressBoard, claims: Claims
    ) -> None:
        """Begin a trial.

        Args:
            config: what the searcher suggested.
            plan, board, claims: the same for all trials of a search.
        """
        self._plan, self._board, self._claims = plan, board, claims
        torch.set_num_threads(plan.threads)
        # Now, and not after an hour on a CPU.
        own_device()
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial in the same process."""
        self._boundaries = boundaries_of(new_config, self._plan.grid)
        self._rung = 0
        return True

    def step(self) -> dict[str, Any]:
        """Train all experts to the next rung and score them."""
        plan, steps = self._plan, self._plan.rungs[self._rung]
        jobs = plan.jobs(self._boundaries, steps)
        before: list[TrainJob | None] = [None] * len(jobs)
        if self._rung > 0:
            before = list(plan.jobs(self._boundaries, plan.rungs[self._rung - 1]))

        def on_expert(index: int | None) -> None:
            self._tell("waits for another trial's expert" if index is None else _place(index, len(jobs)))

        def observer_of(index: int) -> _Expert:
            return _Expert(self._tell, self._warn, _place(index, len(jobs)), jobs[index].train.max_steps)

        last = self._rung + 1 == len(plan.rungs)
        outcomes = train_all(
            jobs, before, claims=self._claims, owner=self.trial_id, on_expert=on_expert, observer_of=observer_of, last=last
        )
        self._tell("scoring")
        measured = plan.scoring.measure([outcome.last_weights for outcome in outcomes], self._boundaries)
        self._rung += 1
        values = np.array(measured[plan.metric])
        return {
            STEPS: steps,
            SCORE: float(values.mean()),
            "score_error": standard_error(values - np.array(plan.baseline)),
            "measured": measured,
            "experts": [job.name for job in jobs],
            "done": self._rung == len(plan.rungs),
        }

    def _tell(self, doing: str) -> None:
        self._board.push(self.trial_id, "doing", self._rung, {}, {"doing": doing})

    def _warn(self, text: str) -> None:
        self._board.push(self.trial_id, "message", self._rung, {}, {"text": text})


class _Expert(Silence):
    """Tells a trial's driver how far the training of an expert is, and what is wrong with it."""

    def __init__(self, tell: Callable[[str], None], warn: Callable[[str], None], place: str, steps: int) -> None:
        self._tell, self._warn, self._place, self._steps = tell, warn, place, steps

    def on_metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._tell(f"{self._place}, {step / self._steps:.0%}")

    def on_trip(self, step: int, trip: Trip) -> None:
        self._warn(f"{self._place}: guard: {trip.describe()}")

    def on_message(self, step: int, text: str) -> None:
        self._warn(f"{self._place}: {text}")


def _place(index: int, count: int) -> str:
    return f"expert {index + 1} of {count}"


def standard_error(values: NDArray[np.float64]) -> float:
    """Return the standard error of the mean of values; 0 for a single one.

    A trial's is that of its gains over the common start, crop by crop: crops differ far more from each other than trials do.
    """
    return float(values.std(ddof=1)) / sqrt(len(values)) if len(values) > 1 else 0.0
