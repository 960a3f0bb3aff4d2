"""How long a trainer waits for room, with a clock of the test's own."""

import socket
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    RestartingState,
    RunningState,
    SchedulingState,
)
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from linearsr_platform.cluster.patience import STARTS, TELL_S, Patience
from linearsr_platform.cluster.process_group import _join
from linearsr_platform.errors import StageError

POLL_S = 10.0
TRYING = SchedulingState(ResizeDecision(2, {"CPU": 1.0}))


class Wait:
    """A trainer's wait of at most a minute, and the time it is."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.patience = Patience(60.0, "found no room", clock=lambda: self.now_s)

    def no_room(self, times: int) -> None:
        for _ in range(times):
            self.patience.look(TRYING)
            self.now_s += POLL_S
            self.patience.look(ReschedulingState(ControllerError(WorkerGroupStartupTimeoutError(2))))

    def run(self, for_s: float) -> None:
        self.patience.look(TRYING)
        self.patience.look(RunningState())
        self.now_s += for_s
        self.patience.look(RunningState())

    def lose_worker(self) -> RestartingState:
        state = RestartingState(WorkerGroupError("a worker died", {0: RuntimeError("gone")}))
        self.patience.look(state)
        return state

    def fail_start(self) -> None:
        self.patience.look(TRYING)
        self.now_s += POLL_S
        self.patience.look(ReschedulingState(ControllerError(WorkerGroupStartupFailedError("port taken"))))


def test_a_wait_ends_in_time_and_one_after_workers_ran_has_as_long() -> None:
    wait = Wait()
    wait.patience.look(InitializingState())
    wait.no_room(5)
    wait.run(for_s=200_000)
    wait.lose_worker()
    wait.no_room(5)
    with pytest.raises(StageError, match=r"^found no room$"):
        wait.no_room(1)


def test_of_a_long_wait_its_user_is_told_once() -> None:
    now_s, told = [0.0], []
    patience = Patience(3600.0, "found no room", tell=told.append, clock=lambda: now_s[0])
    for _ in range(2):
        for _ in range(30):
            patience.look(InitializingState())
            now_s[0] += POLL_S
        patience.look(RunningState())
    assert told == [TELL_S] * 2


def test_a_wait_ends_in_time_also_if_nothing_is_tried() -> None:
    wait = Wait()
    wait.run(for_s=5)
    # What a controller keeps whose elastic trainer finds no room for its fewest workers.
    state = wait.lose_worker()
    for _ in range(59):
        wait.now_s += 1
        wait.patience.look(state)
    wait.now_s += 1
    with pytest.raises(StageError, match=r"^found no room$"):
        wait.patience.look(state)


def test_a_start_that_failed_had_room_and_may_be_followed_by_a_few() -> None:
    wait = Wait()
    wait.patience.look(InitializingState())
    wait.no_room(5)
    wait.fail_start()
    wait.no_room(5)
    for _ in range(STARTS - 2):
        wait.fail_start()
    wait.run(for_s=1)
    for _ in range(STARTS - 1):
        wait.fail_start()
    with pytest.raises(StageError, match=rf"failed to start {STARTS} times in a row, at last because: port taken"):
        wait.fail_start()


def test_a_failed_start_counts_once_however_long_the_wait_after_it() -> None:
    wait = Wait()
    state = ReschedulingState(ControllerError(WorkerGroupStartupFailedError("port taken")))
    for _ in range(2 * STARTS):
        wait.patience.look(state)
        wait.now_s += 1


def test_a_port_that_is_taken_makes_a_start_fail_which_ray_train_tries_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        # In a process of its own: other tests may have left this one in a group. The error must come from there as the controller gets it.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
            joining = worker.submit(_join, world_rank=0, world_size=2, url=url, backend="gloo")
            with pytest.raises(WorkerGroupStartupFailedError, match=r"worker 0 did not join the others: DistNetworkError: .*in use"):
                joining.result()
