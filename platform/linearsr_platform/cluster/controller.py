"""The process that controls a trainer: Ray Train's, which besides can be stopped while it waits, and gives back what it reserved."""

import asyncio
from contextlib import ExitStack
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution import controller, worker_group
from ray.train.v2._internal.execution.controller.controller import TrainControllerLoopIterationResult
from ray.train.v2._internal.execution.controller.state import ReschedulingState, TrainControllerState

from linearsr_platform.cluster.patience import WITHOUT_WORKERS, Patience

PAUSE_S = 0.5
"""Between two looks for room. Ray asks the cluster about an elastic trainer's once a second."""


class WorkerGroup(worker_group.WorkerGroup):
    """Workers whose reservation goes with them if they fail after they have been made, as while they join each other.

    Ray ends and forgets what it has made only up to then. A reservation that was forgotten lasts as long as the controller, and on a full
    cluster the next start waits for it in vain.
    """

    def _start(self) -> None:
        try:
            with ExitStack() as undo:
                undo.callback(self._give_back)
                super()._start()  # type: ignore[no-untyped-call]
                undo.pop_all()
        except RayActorError as error:
            # Ray does not try again after one that it has not named so: of a worker that was lost when training was to begin.
            raise WorkerGroupStartupFailedError("a worker was lost before it began to train") from error

    def _give_back(self) -> None:
        if self.has_started():
            self.get_worker_group_state().shutdown()  # type: ignore[no-untyped-call]
            self._clear_state()  # type: ignore[no-untyped-call]


class TrainController(controller.TrainController):
    """Waits with `Patience`, and is woken by what it is told meanwhile.

    Ray's own never suspends while there is no room: it is told to abort in vain, and starts workers for a trainer that was cancelled. An
    elastic trainer's takes all of a core besides.
    """

    worker_group_cls = WorkerGroup

    def __init__(self, patience: Patience, **ray_train: Any) -> None:
        """Keep the patience; the rest is Ray's."""
        self._patience = patience
        self._before: TrainControllerState | None = None
        super().__init__(**ray_train)

    async def _step(self) -> TrainControllerLoopIterationResult:
        state = self.get_state()
        self._patience.look(state)
        # Not before a first start, and not before a restart after one that went well.
        if isinstance(state, ReschedulingState) or (isinstance(state, WITHOUT_WORKERS) and state is self._before):
            await asyncio.sleep(PAUSE_S)
            if self.get_state().is_terminal():
                # Aborted meanwhile.
                ray.actor.exit_actor()  # type: ignore[no-untyped-call]
        self._before = state
        return await super()._step()
