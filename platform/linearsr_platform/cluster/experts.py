"""Several trainers at once, each its own Ray Train run; those that find no room wait their turn."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ray
from ray import ObjectRef
from ray.exceptions import RayError

from linearsr_platform import storage
from linearsr_platform.cluster.board import Event, ProgressBoard
from linearsr_platform.cluster.capacity import Room, Share, fits, require_room, share_of_worker, workers_and_share
from linearsr_platform.cluster.demand import Demand
from linearsr_platform.cluster.record import claim_folder, finished_outcome, run_name
from linearsr_platform.cluster.reservations import release_abandoned
from linearsr_platform.errors import StageError, UserError
from linearsr_platform.recipe.schema import ClusterConfig
from linearsr_platform.train.job import TrainJob
from linearsr_platform.train.outcome import TrainOutcome

POLL_S = 0.3
LOOK_S = 5.0
"""Between two looks at how many machines the cluster has."""
CANCEL_S = 30.0
"""How long cancelled trainers get to give their workers back."""

RELEASE_S = 3.0
"""Between two looks for what lost trainers have reserved."""

logger = logging.getLogger(__name__)
OnPoll = Callable[[list[Event]], None]


@dataclass(frozen=True, kw_only=True)
class TrainerFailure:
    """Why one of several trainers has no outcome."""

    name: str
    message: str
    """One sentence, beginning with the name."""
    details: str = ""
    """The worker's traceback."""
    by_user: bool = False
    """Whether it is a mistake of the user."""
    lost: bool = False
    """Whether the process that drives the trainer was lost, which says nothing against another try."""


Result = TrainOutcome | TrainerFailure
Ref = ObjectRef[Result]


def fit_all(
    jobs: Sequence[TrainJob],
    cluster: ClusterConfig,
    *,
    storage_url: str,
    board: ProgressBoard,
    on_poll: OnPoll,
    cpus_per_worker: float | None = None,
    keep_checkpoints: bool = False,
) -> dict[str, Result]:
    """Train all jobs, as many at once as there is room for, and return what became of each, by name.

    A failing job leaves the others alone. Finished jobs start nothing. When this is interrupted, by Ctrl-C or by an exception
    of `on_poll`, running trainers are cancelled; they resume from their checkpoints when it is called again.

    Args:
        jobs: with distinct names, folders and hence checkpoints.
        cluster: how much each worker gets.
        storage_url: folder for the checkpoints of jobs.
        board: told about progress.
        on_poll: called about three times a second with the new events, also if there are none.
        cpus_per_worker: instead of `cluster.cpus_per_worker`.
        keep_checkpoints: whether those of a finished job stay.

    Raises:
        UserError: if a job could never start on this cluster.
    """
    results: dict[str, Result] = {}
    queue: deque[TrainJob] = deque()
    for job in jobs:
        outcome = finished_outcome(job)
        if outcome is None:
            claim_folder(job)
            queue.append(job)
        else:
            results[job.name] = outcome
            if not keep_checkpoints:
                storage.remove(storage.join(storage_url, run_name(job)))
    if queue:
        room = room_now()
        share = max((_share(job, cluster, room, cpus_per_worker) for job in queue), key=lambda share: share.memory_bytes)
        if cluster.address is None:
            require_room({job.name: job.train.least_workers for job in queue}, share, room)
        _Fleet(cluster, share, room, storage_url, board, keep_checkpoints).run(queue, on_poll, results)
    return {job.name: results[job.name] for job in jobs}


def _share(job: TrainJob, cluster: ClusterConfig, room: Room, cpus: float | None) -> Share:
    """Return what each of a job's workers reserves."""
    memory = job.memory_bytes or dict.fromkeys((job.train.least_workers, job.train.workers), 0.0)
    shares = {workers: share_of_worker(cluster, cpus=cpus, memory_bytes=memory_bytes) for workers, memory_bytes in memory.items()}
    return workers_and_share(shares, room)[1]


class _Fleet:
    """Starts trainers as room comes free and collects what became of them."""

    def __init__(self, cluster: ClusterConfig, share: Share, room: Room, storage_url: str, board: ProgressBoard, keep: bool) -> None:
        self._cluster, self._share, self._room = cluster, share, room
        self._storage_url, self._board, self._keep = storage_url, board, keep
        self._running: dict[Ref, TrainJob] = {}
        self._demand = Demand()
        self._restarts: Counter[str] = Counter()
        self._released_s, self._looked_s = float("-inf"), time.monotonic()

    def run(self, queue: deque[TrainJob], on_poll: OnPoll, results: dict[str, Result]) -> None:
        """Work off the queue, in its order."""
        try:
            while queue or self._running:
                self._start(queue)
                done, _ = ray.wait(list(self._running), timeout=POLL_S)
                for ref in done:
                    job = self._running.pop(ref)
                    result = self._result(ref, job)
                    if self._again(result, job):
                        queue.append(job)
                    else:
                        results[job.name] = self._told(result, job)
                self._release()
                on_poll(self._board.drain())
        finally:
            self._cancel()
            self._demand.withdraw()

    def _start(self, queue: deque[TrainJob]) -> None:
        # On an existing cluster the first trainer is started in any case: it may grow, or others may leave it.
        now_s = time.monotonic()
        if self._cluster.address is not None and now_s >= self._looked_s + LOOK_S:
            # Machines have come or gone.
            self._room, self._looked_s = room_now(), now_s
        while queue and (not self._running or fits(queue[0], list(self._running.values()), self._share, self._room)):
            job = queue.popleft()
            # The name is what Ray's dashboard and `ray list tasks` show.
            task = _train.options(name=f"train {job.name}")
            ref = task.remote(job, self._cluster, self._storage_url, self._board, self._share, self._keep)
            self._running[ref] = job
        if self._cluster.address is not None:
            # Those that wait are unknown to Ray until they start, and with nobody asking no machine would come for them.
            self._demand.ask(self._share, sum(job.train.workers for job in queue))

    def _result(self, ref: Ref, job: TrainJob) -> Result:
        try:
            return ray.get(ref)
        except RayError as error:
            reason = str(error).strip().splitlines()[-1]
            return TrainerFailure(name=job.name, message=f"{job.name}: its trainer died: {reason}", details=str(error), lost=True)

    def _again(self, result: Result, job: TrainJob) -> bool:
        """Say whether a trainer is started anew, from its last checkpoint: Ray restarts workers, but not what drives them."""
        if isinstance(result, TrainOutcome) or not result.lost or self._restarts[job.name] >= job.train.max_failures:
            return False
        self._restarts[job.name] += 1
        causes = "killed, out of memory, or its machine gone"
        text = f"the process that drives it was lost ({causes}); starting it again, from its last checkpoint"
        self._board.push(job.name, "message", 0, {}, {"text": text})
        return True

    def _release(self) -> None:
        """Give back what lost trainers had reserved; now and then, because a controller may die some time after the task that drives it.

        Also what a trainer has left that was lost for good in an earlier call.
        """
        if time.monotonic() >= self._released_s + RELEASE_S:
            release_abandoned()
            self._released_s = time.monotonic()

    def _told(self, result: Result, job: TrainJob) -> Result:
        if isinstance(result, TrainOutcome):
            self._board.push(job.name, "end", result.steps, {}, {"stopped_by": result.stopped_by})
        else:
            self._board.push(job.name, "end", 0, {}, {"error": result.message})
        return result

    def _cancel(self) -> None:
        """Stop what still runs and wait until its workers are given back."""
        running = list(self._running)
        for ref in running:
            # Not by force: Ray Train then has no chance to give up the workers' reservation.
            ray.cancel(ref, force=False)
        _, stuck = ray.wait(running, num_returns=len(running), timeout=CANCEL_S) if running else ([], [])
        if stuck:
            names = ", ".join(self._running[ref].name for ref in stuck)
            logger.warning("trainers did not stop within %g s: %s", CANCEL_S, names)


@ray.remote(num_cpus=0, max_retries=0)
def _train(job: TrainJob, cluster: ClusterConfig, storage_url: str, board: ProgressBoard, share: Share, keep_checkpoints: bool) -> Result:
    """Run one trainer. A task, because it can be cancelled; without CPUs, because an expert would wait for its own."""
    # Imports torch, which the driver need not.
    from linearsr_platform.cluster.trainer import fit

    try:
        return fit(job, cluster, storage_url=storage_url, board=board, share=share, keep_checkpoints=keep_checkpoints)
    except (UserError, StageError) as error:
        details, lost = getattr(error, "details", ""), getattr(error, "lost", False)
        return TrainerFailure(name=job.name, message=str(error), details=details, by_user=isinstance(error, UserError), lost=lost)


def room_now() -> Room:
    """Return what the connected cluster has in all, whoever uses it."""
    return Room(nodes=machines())


def machines() -> tuple[Share, ...]:
    """Return what each machine of the connected cluster has in all."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return tuple(
        Share(cpus=resources.get("CPU", 0.0), gpus=resources.get("GPU", 0.0), memory_bytes=resources.get("memory", 0.0))
        for resources in nodes
    )
