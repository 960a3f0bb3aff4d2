"""How many workers a cluster has room for, as plain arithmetic. Imports no Ray."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from linearsr_platform.errors import UserError
from linearsr_platform.recipe.schema import ClusterConfig
from linearsr_platform.train.job import TrainJob

TRAINER_BYTES = 0.5e9
"""Memory of the other processes of one trainer: what starts it, controller, synchronisation, its share of the autoscaler."""
WORKER_BYTES = 0.8e9
"""Memory of a worker with torch and DeepSpeed before its first step."""
ROUNDING = 1e-9
"""Ten shares of 0.1 CPU fit one CPU."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one worker reserves."""

    cpus: float
    gpus: float = 0.0

    def __str__(self) -> str:
        """Write it for people."""
        return f"{self.cpus:g} CPUs" + (f" and {self.gpus:g} GPUs" if self.gpus else "")


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a cluster has."""

    nodes: tuple[Share, ...]
    """What each machine has in all."""
    memory_bytes: float | None = None
    """Memory for all trainers together; None does not count it."""

    def workers(self, share: Share) -> int:
        """Return how many workers fit at once; each needs its share on one machine."""
        return sum(
            min(int(node.cpus / share.cpus + ROUNDING), int(node.gpus / share.gpus + ROUNDING) if share.gpus else 2**31)
            for node in self.nodes
        )


def share_of_worker(cluster: ClusterConfig) -> Share:
    """Return what a worker reserves where no stage says otherwise; a search's trials do too."""
    return Share(cpus=cluster.cpus_per_worker, gpus=cluster.gpus_per_worker)


def no_room(workers: int, share: Share, waited_s: float) -> str:
    """Say that so many workers found no room in a running cluster, and what to do about it."""
    return (
        f"found no room for {workers} workers of {share} in {waited_s:g} s; "
        "fix: wait for other work to end, or raise cluster.queue_timeout_s"
    )


def require_room(workers: Mapping[str, int], share: Share, room: Room) -> None:
    """Refuse trainers that could never start, however long they wait.

    Args:
        workers: of each trainer, by name.
        share: of a worker.
        room: of the cluster.

    Raises:
        UserError: with the arithmetic of the first of them.
    """
    most = room.workers(share)
    for name, wanted in workers.items():
        if wanted > most:
            total = Share(cpus=sum(node.cpus for node in room.nodes), gpus=sum(node.gpus for node in room.nodes))
            raise UserError(
                f"{name}: got {wanted} workers of {share} each; expected at most {most}, because the cluster has {total} "
                f"on {len(room.nodes)} machines; fix: lower train.workers or cpus_per_worker, or raise cluster.num_cpus"
            )


def trials_at_once(share: Share, room: Room, *, wanted: int | None, may_grow: bool = False) -> int:
    """Return how many trials of a search run at once: what there is room for, and at most `wanted`. A trial is one process.

    Args:
        share: of a trial.
        room: of the cluster.
        wanted: at most; None for no limit.
        may_grow: whether one runs in any case: it waits for the machine that it makes an autoscaler start.

    Raises:
        UserError: with the arithmetic, if not even one has room.
    """
    by_memory = room.memory_bytes // WORKER_BYTES if room.memory_bytes is not None else None
    most = room.workers(share) if by_memory is None else min(room.workers(share), int(by_memory))
    if most < 1 and may_grow:
        return 1
    if most < 1:
        machines = ", ".join(str(node) for node in room.nodes)
        memory = "" if room.memory_bytes is None else f" and {room.memory_bytes / 1e9:.1f} GB of memory"
        raise UserError(
            f"search: got no room for a trial, which takes {share} on one machine and {WORKER_BYTES / 1e9:.1f} GB, on a cluster whose "
            f"machines have {machines}{memory}; expected room for one; fix: lower cluster.cpus_per_worker or cluster.gpus_per_worker, "
            "or raise cluster.num_cpus"
        )
    return most if wanted is None else min(most, wanted)


def fits(job: TrainJob, running: Sequence[TrainJob], share: Share, room: Room) -> bool:
    """Tell whether a job has room beside those that run. One job alone always has, as far as memory goes.

    An elastic one starts with what it needs at least, and those that run have taken all that they may.
    """
    workers = job.train.least_workers + sum(other.train.workers for other in running)
    memory = (1 + len(running)) * TRAINER_BYTES + workers * WORKER_BYTES
    enough_memory = room.memory_bytes is None or not running or memory <= room.memory_bytes
    return workers <= room.workers(share) and enough_memory
