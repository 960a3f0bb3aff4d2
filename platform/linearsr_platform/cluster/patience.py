"""How long a trainer waits for room, and how often its workers may fail to start."""

import time
from collections.abc import Callable

from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    RestartingState,
    RunningState,
    TrainControllerState,
)
from ray.train.v2.api.exceptions import ControllerError

from linearsr_platform.errors import StageError

WITHOUT_WORKERS = (InitializingState, ReschedulingState, RestartingState)
"""States of a controller that decides whether to start workers: at first, after a start that failed, after workers that failed."""
TELL_S = 60.0
"""Of a wait, after which its user is told what for."""
STARTS = 5
"""Starts in a row that may fail although there was room. One alone may be a port that was taken or a machine that was lost."""


class Patience:
    """Says when a trainer gives up waiting. Each wait is as long as the first: workers that ran make it begin anew.

    Ray's own limit, `FailureConfig.controller_failure_limit`, counts over a trainer's whole life, and does not count looks at a cluster
    that has no room for an elastic trainer's fewest workers.
    """

    def __init__(
        self, limit_s: float, refusal: str, *, tell: Callable[[float], None] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Keep how long a wait may be, what to say of one that is longer, and whom to tell once of one that takes `TELL_S`, in seconds."""
        self._limit_s, self._refusal, self._tell, self._clock = limit_s, refusal, tell, clock
        self._began_s: float | None = None
        self._told = False
        self._failed = 0
        self._seen: TrainControllerState | None = None

    def look(self, state: TrainControllerState) -> None:
        """Take note of a controller's state, before each of its steps.

        Raises:
            StageError: if it has waited long enough, or its workers have failed to start often enough.
        """
        if isinstance(state, RunningState):
            self._began_s, self._failed, self._told = None, 0, False
        elif isinstance(state, WITHOUT_WORKERS):
            # A controller that goes on waiting keeps its state, whose failure was counted already.
            if state is not self._seen and (failure := _failed_start(state)) is not None:
                self._count(failure)
            self._seen = state
            now_s = self._clock()
            self._began_s = now_s if self._began_s is None else self._began_s
            if now_s - self._began_s >= self._limit_s:
                raise StageError(self._refusal)
            if self._tell is not None and not self._told and now_s - self._began_s >= TELL_S:
                self._told = True
                self._tell(now_s - self._began_s)

    def _count(self, failure: WorkerGroupStartupFailedError) -> None:
        """Count a start that failed; there was room for it, so the wait is over."""
        self._began_s = None
        self._failed += 1
        if self._failed >= STARTS:
            raise StageError(f"its workers failed to start {self._failed} times in a row, at last because: {failure}")


def _failed_start(state: TrainControllerState) -> WorkerGroupStartupFailedError | None:
    """Return why the start failed that led to a state, if it did so although there was room."""
    error = state.training_failed_error if isinstance(state, ReschedulingState) else None
    failure = error.controller_failure if isinstance(error, ControllerError) else None
    return failure if isinstance(failure, WorkerGroupStartupFailedError) else None
