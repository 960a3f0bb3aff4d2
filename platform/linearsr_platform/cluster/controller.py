"""The process that controls a trainer: Ray Train's, which besides can be stopped while it waits."""

import asyncio
from typing import Any

import ray
from ray.train.v2._internal.execution import controller
from ray.train.v2._internal.execution.controller.controller import TrainControllerLoopIterationResult
from ray.train.v2._internal.execution.controller.state import ReschedulingState, TrainControllerState

from linearsr_platform.cluster.patience import WITHOUT_WORKERS, Patience

PAUSE_S = 0.5
"""Between two looks for room. Ray asks the cluster about an elastic trainer's once a second."""


class TrainController(controller.TrainController):
    """Waits with `Patience`, and is woken by what it is told meanwhile.

    Ray's own never suspends while there is no room: it is told to abort in vain, and starts workers for a trainer that was cancelled. An
    elastic trainer's takes all of a core besides.
    """

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
