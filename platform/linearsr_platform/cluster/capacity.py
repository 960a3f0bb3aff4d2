"""How many workers a cluster has room for, as plain arithmetic. Imports no Ray."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

from linearsr_platform.errors import UserError
from linearsr_platform.recipe.schema import ClusterConfig
from linearsr_platform.train.job import TrainJob

ROUNDING = 1e-9
"""Ten shares of 0.1 CPU fit one CPU."""


CLAMPED = 0.95
"""Of a machine's memory that is reserved where all of it would be too little: one that takes its place may count a little less."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one worker reserves, or what one machine has."""

    cpus: float
    gpus: float = 0.0
    memory_bytes: float = 0.0
    """Host memory; 0 reserves none. A machine's may be infinite, where nobody knows it."""

    def __str__(self) -> str:
        """Write it for people."""
        parts = [f"{self.cpus:g} CPUs"]
        parts += [f"{self.gpus:g} GPUs"] if self.gpus else []
        parts += [f"{self.memory_bytes / 1e9:.3g} GB of memory"] if 0 < self.memory_bytes < inf else []
        return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))

    @property
    def resources(self) -> dict[str, float]:
        """What Ray is asked for, by its names; it takes memory in whole bytes."""
        gpus = {"GPU": self.gpus} if self.gpus else {}
        memory = {"memory": float(int(self.memory_bytes))} if self.memory_bytes >= 1 else {}
        return {"CPU": self.cpus, **gpus, **memory}


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a cluster has."""

    nodes: tuple[Share, ...]
    """What each machine has in all."""

    def workers(self, share: Share) -> int:
        """Return how many workers fit at once; each needs its share on one machine."""
        return sum(_times(node, share) for node in self.nodes)

    def attainable(self, share: Share, workers: int) -> Share:
        """Return a share with no more memory than lets a trainer of so many workers start when it has all machines to itself.

        What a worker takes is an estimate, and what Ray counts as a machine's memory may be a part of it: by themselves they are no reason
        never to try, only not to try two at once.
        """
        without = replace(share, memory_bytes=0.0)
        workers = min(workers, self.workers(without))
        limits = {CLAMPED * node.memory_bytes / count for node in self.nodes for count in range(1, min(workers, _times(node, without)) + 1)}
        amounts = sorted({share.memory_bytes, *(limit for limit in limits if limit < share.memory_bytes)}, reverse=True)
        # The least always does: with it memory keeps no machine from taking as many as its CPUs and GPUs do.
        return next(smaller for memory in amounts if self.workers(smaller := replace(share, memory_bytes=memory)) >= workers)


def workers_and_share(shares: Mapping[int, Share], room: Room) -> tuple[int, Share]:
    """Return how many workers a trainer has that has all machines to itself, and what each of them reserves: as many as find room.

    Where there is not even room for its fewest, `attainable` decides, because what they take is an estimate; and where there are no such
    machines yet, it is to have all.

    Args:
        shares: of each worker, by how many they may be; the fewer they are, the more memory each may take.
        room: of the cluster.
    """
    counts = sorted(shares, reverse=True)
    found = next((count for count in counts if room.workers(shares[count]) >= count), None)
    if found is not None:
        return found, shares[found]
    count = counts[-1] if room.workers(replace(shares[counts[0]], memory_bytes=0.0)) else counts[0]
    return count, room.attainable(shares[count], count)


def _times(node: Share, share: Share) -> int:
    """Return how many shares a machine has."""
    amounts = [(node.cpus, share.cpus), (node.memory_bytes, share.memory_bytes)]
    counts = [int(min(has / wanted, 2**31) + ROUNDING) for has, wanted in amounts if wanted]
    if share.gpus:
        # A fraction is one of a single GPU: three of 0.6 find no room on two.
        whole = share.gpus >= 1
        counts.append(int(node.gpus / share.gpus + ROUNDING) if whole else int(node.gpus + ROUNDING) * sharers_of_gpu(share.gpus))
    return min(counts)


def sharers_of_gpu(gpus: float) -> int:
    """Return how many workers of that many GPUs each, more than 0, Ray puts on one GPU; 1 where each has one or more."""
    return max(1, int(1 / gpus + ROUNDING))


def share_of_worker(cluster: ClusterConfig, *, cpus: float | None = None, memory_bytes: float | None = None) -> Share:
    """Return what a worker reserves; a search's trials do too.

    Args:
        cluster: the recipe's.
        cpus: of a stage that has its own; None for `cluster.cpus_per_worker`.
        memory_bytes: what it is thought to take, where the recipe does not say what to reserve; None for nothing.
    """
    own = cluster.memory_gb_per_worker
    memory = (memory_bytes or 0.0) if own is None else own * 1e9
    return Share(cpus=cpus or cluster.cpus_per_worker, gpus=cluster.gpus_per_worker, memory_bytes=memory)


def no_room(workers: int, share: Share, waited_s: float) -> str:
    """Say that so many workers found no room in a running cluster, and what to do about it."""
    settings = "cluster.queue_timeout_s" + (", or lower cluster.memory_gb_per_worker" if share.memory_bytes else "")
    return f"found no room for {workers} workers of {share} in {waited_s:g} s; fix: wait for other work to end, or raise {settings}"


def still_waiting(workers: int, share: Share, room: Room, *, waited_s: float, limit_s: float) -> str:
    """Say what so many workers have waited for in a running cluster, of which nothing may be wrong."""
    machines = "; ".join(str(node) for node in room.nodes) or "none"
    waited = f"has waited {waited_s:.0f} of at most {limit_s:g} s for room for {workers} workers of {share}"
    return f"{waited}, free or on machines that an autoscaler starts; machines now, in all: {machines}"


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
            total = Share(
                cpus=sum(node.cpus for node in room.nodes),
                gpus=sum(node.gpus for node in room.nodes),
                memory_bytes=sum(node.memory_bytes for node in room.nodes) if share.memory_bytes else 0.0,
            )
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
        may_grow: whether machines may still come, or others leave them: then `wanted` run, as room comes, and one runs in any case.

    Raises:
        UserError: with the arithmetic, if not even one has room.
    """
    most = room.workers(share)
    if may_grow:
        return max(1, most) if wanted is None else wanted
    if most < 1:
        machines = "; ".join(str(node) for node in room.nodes)
        raise UserError(
            f"search: got no room for a trial, which takes {share} on one machine, on a cluster whose machines have {machines}; expected "
            "room for one; fix: lower cluster.cpus_per_worker or cluster.gpus_per_worker, or raise cluster.num_cpus"
        )
    return most if wanted is None else min(most, wanted)


def fits(job: TrainJob, running: Sequence[TrainJob], share: Share, room: Room) -> bool:
    """Tell whether a job has room beside those that run.

    An elastic one starts with what it needs at least, and those that run have taken all that they may.
    """
    return job.train.least_workers + sum(other.train.workers for other in running) <= room.workers(share)
