"""Ray Tune over boundaries: as many trials at once as there is room for, and an observer that is told everything."""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ray import tune
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from linearsr_platform import storage
from linearsr_platform.cluster.board import Event, ProgressBoard
from linearsr_platform.cluster.capacity import Share
from linearsr_platform.cluster.demand import Demand
from linearsr_platform.cluster.experts import POLL_S
from linearsr_platform.cluster.trial import BoundaryTrial, TrialPlan
from linearsr_platform.cluster.warm import Claims
from linearsr_platform.errors import StageError


class SweepLost(StageError):
    """All trials were ended by the loss of a process; started again, the sweep goes on from what was reported and trained."""


class SweepObserver(Protocol):
    """Who is told how a sweep goes; in the driver, one call at a time. Trials are known by Tune's ids."""

    def on_start(self, trial: str, config: Mapping[str, Any]) -> None:
        """A trial begins with what the searcher suggested, or begins anew after its process was lost."""

    def on_result(self, trial: str, result: Mapping[str, Any]) -> None:
        """A trial has reached a rung; see `BoundaryTrial.step`."""

    def on_end(self, trial: str) -> None:
        """A trial is at its last rung, or the scheduler has stopped it."""

    def on_failure(self, trial: str, reason: str) -> None:
        """A trial has failed for good."""

    def on_poll(self, events: list[Event]) -> None:
        """Called about three times a second with what trials say they are doing."""


def run_sweep(
    plan: TrialPlan,
    *,
    searcher: Searcher,
    scheduler: TrialScheduler,
    trials: int,
    concurrent: int,
    share: Share,
    max_failures: int,
    storage_url: str,
    board: ProgressBoard,
    observer: SweepObserver,
    grow: bool = False,
) -> None:
    """Run trials until `trials` of them have ended or failed.

    Args:
        plan: what all trials have in common.
        searcher: suggests boundaries.
        scheduler: stops bad ones at a rung.
        trials: how many.
        concurrent: how many at once; see `capacity.trials_at_once`.
        share: what a trial reserves.
        max_failures: how often a trial may be started again after its process was lost or it raised an error.
        storage_url: folder for Tune's own notes, which nothing depends on.
        board: that trials write to.
        observer: who is told.
        grow: whether the cluster's autoscaler is asked for room for all that run at once. Tune by itself asks for one more than has room.

    Raises:
        SweepLost: if a process was lost in a way that Tune has no answer to.
    """
    claims, demand = Claims.start(), Demand()
    wanted = _Wanted(demand, share, concurrent, trials) if grow else None
    try:
        teller = _Teller(observer, board, claims, wanted)
        tune.Tuner(
            tune.with_resources(tune.with_parameters(BoundaryTrial, plan=plan, board=board, claims=claims), share.resources),
            tune_config=tune.TuneConfig(
                search_alg=searcher, scheduler=scheduler, num_samples=trials, max_concurrent_trials=concurrent, reuse_actors=True
            ),
            run_config=_run_config(storage_url, max_failures, teller),
        ).fit()
    except RayActorError as error:
        raise SweepLost("trials: lost a process that all of them report to") from error
    except RuntimeError as error:
        # Tune counts a trial as failed, and starts it again, where an actor has died, but ends everything where Ray has killed one
        # because its machine was out of memory: that is no `RayActorError`.
        if not isinstance(error.__cause__, OutOfMemoryError | NodeDiedError):
            raise
        raise SweepLost("trials: a machine ran out of memory, and Ray ended what ran there") from error
    finally:
        demand.withdraw()
        claims.close()


def _run_config(storage_url: str, max_failures: int, teller: tune.Callback) -> tune.RunConfig:
    return tune.RunConfig(
        name="tune",
        storage_path=storage.absolute(storage_url),
        # Trained experts are kept in the store; a trial itself has nothing to save.
        checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
        failure_config=tune.FailureConfig(max_failures=max_failures),
        callbacks=[teller],
        verbose=0,
    )


class _Wanted:
    """Keeps asking for room for all trials that may run at once, which are the fewer the more have ended."""

    def __init__(self, demand: Demand, share: Share, concurrent: int, trials: int) -> None:
        self._demand, self._share, self._concurrent, self._trials = demand, share, concurrent, trials

    def ask(self, ended: int) -> None:
        self._demand.ask(self._share, min(self._concurrent, self._trials - ended))


class _Teller(tune.Callback):
    """Passes on what Tune says, and gives up the claims of trials that can no longer do so."""

    def __init__(self, observer: SweepObserver, board: ProgressBoard, claims: Claims, wanted: _Wanted | None) -> None:
        self._observer, self._board, self._claims, self._wanted = observer, board, claims, wanted
        self._polled_s = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Keep nothing: Tune pickles its callbacks for a way of resuming that is not used, and the observer belongs to this process."""
        return {}

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        now_s = time.monotonic()
        if now_s - self._polled_s >= POLL_S:
            self._polled_s = now_s
            self._observer.on_poll(self._board.drain())
            if self._wanted is not None:
                self._wanted.ask(sum(trial.status in (Trial.TERMINATED, Trial.ERROR) for trial in trials))

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._observer.on_start(trial.trial_id, trial.config)

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        self._observer.on_result(trial.trial_id, result)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._observer.on_end(trial.trial_id)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._claims.release(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._claims.release(trial.trial_id)
        # Of a trial whose process never came up nobody has heard yet.
        self._observer.on_start(trial.trial_id, trial.config)
        self._observer.on_failure(trial.trial_id, _reason(trial))


def _reason(trial: Trial) -> str:
    """Return the last line of a failed trial's traceback, without the module that its error is from."""
    # Not `trial.get_error`, which reads where this file is only copied to later.
    file = None if trial.error_file is None else Path(trial.error_file)
    lines = file.read_text(encoding="utf-8").split("\n") if file is not None and file.exists() else []
    last = next((line for line in reversed(lines) if line.strip()), "its process was lost")
    return re.sub(r"^(?:\w+\.)+(?=\w+:)", "", last.strip())
