"""A function that is slow to make, such as a loaded model, applied to many pieces by actors of Ray, each in a process of its own."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from linearsr_platform.cluster.capacity import Room, Share
from linearsr_platform.cluster.device import own_device
from linearsr_platform.cluster.experts import LOOK_S, machines
from linearsr_platform.data.crew import Make
from linearsr_platform.data.executor import P, R
from linearsr_platform.errors import StageError, UserError

LOSSES = 3
"""Times that a piece may lose the worker that does it; whatever is lost more often is most likely what kills them."""
GRACE_S = 5.0
"""What pieces under way have to come to their end when everything is stopped."""

logger = logging.getLogger(__name__)


class RayCrew:
    """Does pieces with Ray actors on the cluster that this process is connected to; satisfies `data.crew.Crew`.

    There are as many workers as the cluster has room for, or `most`, and never more than pieces. Without `most` workers are added when
    machines are. Those that do not fit yet wait for room, which an autoscaler takes for demand, and keep nobody else from working. A
    worker has one piece at a time, so that it is known which one a lost worker did; it gets the next one before the result is yielded.
    """

    def __init__(
        self, share: Share, *, most: int | None = None, environment: Mapping[str, str] | None = None, patience_s: float = 600.0
    ) -> None:
        """Start nothing yet.

        Args:
            share: what each worker reserves; its torch has as many threads as that has whole CPUs.
            most: workers to have, though there may not be room for all of them yet; None is as many as fit.
            environment: variables that workers have beside the cluster's.
            patience_s: how long to wait for the first worker's place.
        """
        self._share, self._most, self._patience_s = share, most, patience_s
        self._environment = dict(environment or {})

    def map_unordered(self, make: Make[P, R], pieces: Sequence[P]) -> Iterator[tuple[int, R]]:
        """Yield (position, result) of every piece as they come; without pieces nothing is made.

        A piece whose worker is lost is done again, by a new one. If the caller stops early, or something fails, pieces under way have
        `GRACE_S` to come to their end; what takes longer is cut off. Workers are gone and their CPUs free afterwards.

        Raises:
            UserError: as `make` and the function do.
            StageError: as they do, naming the piece if they raise something else, or if it lost its worker `LOSSES` times; also if
                workers are lost before they have made the function, or there is no room for one.
        """
        if not pieces:
            return
        more: dict[str, Any] = {"runtime_env": {"env_vars": self._environment}} if self._environment else {}
        memory = int(self._share.memory_bytes)
        worker = ray.remote(_Worker).options(num_cpus=self._share.cpus, num_gpus=self._share.gpus, memory=memory, max_restarts=0, **more)
        shift = _Shift(worker, make, pieces, self._share, self._most, self._patience_s)
        try:
            yield from shift.results()
        finally:
            shift.stop()


class _Worker:
    """Lives in a process of its own and has made the function once."""

    def __init__(self) -> None:
        self._function: Callable[[Any], Any] | None = None

    def begin(self) -> None:
        """Answer, which shows that there was room."""

    def make(self, make: Make[Any, Any], threads: int) -> None:
        """Make the function; refuse to do on a CPU what a GPU was reserved for."""
        import torch

        own_device()
        torch.set_num_threads(threads)
        self._function = make()

    def do(self, piece: Any) -> Any:
        """Do one piece."""
        assert self._function is not None  # noqa: S101 (calls come in order)
        return self._function(piece)


@dataclass(frozen=True)
class _Doing:
    """What a worker is at; each is at one thing."""

    worker: ActorHandle[_Worker]
    what: Literal["begin", "make", "piece"]
    position: int = -1


class _Shift(Generic[P, R]):
    """The workers of one `map_unordered`, and what is left to do."""

    def __init__(self, worker: Any, make: Make[P, R], pieces: Sequence[P], share: Share, most: int | None, patience_s: float) -> None:
        self._remote, self._pieces, self._share, self._most, self._patience_s = worker, pieces, share, most, patience_s
        self._make = ray.put(make)
        self._threads = max(1, int(share.cpus))
        self._waiting = deque(range(len(pieces)))
        self._under_way: dict[ray.ObjectRef[Any], _Doing] = {}
        self._idle: list[ActorHandle[_Worker]] = []
        self._losses: Counter[int] = Counter()
        self._false_starts = 0
        self._wanted = 1
        self._looked_s = float("-inf")
        self._heard_s = time.monotonic()

    def results(self) -> Iterator[tuple[int, R]]:
        left = len(self._pieces)
        while left:
            self._hire()
            ready, _ = ray.wait(list(self._under_way), num_returns=1, timeout=LOOK_S)
            if not ready:
                self._require_room()
                continue
            self._heard_s = time.monotonic()
            # Whoever is at something stays under way until it is known what came of it: `stop` ends all of those.
            doing = self._under_way[ready[0]]
            try:
                result: R = ray.get(ready[0])
            except RayTaskError as error:
                raise self._as_error(error, doing) from error
            except RayError as error:
                del self._under_way[ready[0]]
                self._lost(doing, error)
                continue
            del self._under_way[ready[0]]
            self._next(doing)
            if doing.what == "piece":
                left -= 1
                yield doing.position, result

    def stop(self) -> None:
        """End all workers."""
        busy = [ref for ref, doing in self._under_way.items() if doing.what == "piece"]
        try:
            if busy:
                ray.wait(busy, num_returns=len(busy), timeout=GRACE_S)
        finally:
            for worker in [*self._idle, *(doing.worker for doing in self._under_way.values())]:
                ray.kill(worker)
            self._idle, self._under_way = [], {}

    def _hire(self) -> None:
        """Start workers while there is room, or are to be more, and pieces wait that nobody is about to take."""
        now_s = time.monotonic()
        if self._most is not None:
            self._wanted = self._most
        elif now_s >= self._looked_s + LOOK_S:
            self._wanted, self._looked_s = max(1, Room(nodes=machines()).workers(self._share)), now_s
        while self._waiting and self._idle:
            self._give(self._idle.pop())
        starting = sum(doing.what != "piece" for doing in self._under_way.values())
        for _ in range(min(self._wanted - len(self._under_way), len(self._waiting) - starting)):
            worker = self._remote.remote()
            self._under_way[worker.begin.remote()] = _Doing(worker, "begin")

    def _next(self, doing: _Doing) -> None:
        """Give a worker something to do after what it has done."""
        if doing.what == "begin":
            worker: Any = doing.worker
            self._under_way[worker.make.remote(self._make, self._threads)] = _Doing(doing.worker, "make")
            return
        if doing.what == "make":
            self._false_starts = 0
        if self._waiting:
            self._give(doing.worker)
        else:
            # It stays: another one's piece may come back.
            self._idle.append(doing.worker)

    def _give(self, worker: "ActorHandle[_Worker]") -> None:
        position = self._waiting.popleft()
        self._under_way[worker.do.remote(self._pieces[position])] = _Doing(worker, "piece", position)

    def _lost(self, doing: _Doing, error: RayError) -> None:
        """Have a lost worker's piece done again, unless it is too often."""
        # A worker that merely cannot be reached may still be at it; two must not do one piece.
        ray.kill(doing.worker)
        causes = "killed, out of memory, or its machine gone"
        if doing.what != "piece":
            self._false_starts += 1
            if self._false_starts >= max(LOSSES, self._wanted):
                raise StageError(
                    f"workers: got {self._false_starts} lost one after the other before they could begin: {causes} "
                    f"({_reason(error)}); fix: fewer workers on a machine, or machines with more memory"
                ) from error
            return
        name = self._pieces[doing.position].name
        self._losses[doing.position] += 1
        if self._losses[doing.position] >= LOSSES:
            raise StageError(
                f"{name}: its worker was lost {LOSSES} times: {causes} ({_reason(error)}), out of memory most likely; "
                "fix: fewer workers on a machine, machines with more memory, or leave it out; what is finished is kept"
            ) from error
        logger.warning("%s: its worker was lost, another one does it again: %s", name, _reason(error))
        self._waiting.appendleft(doing.position)

    def _as_error(self, error: RayTaskError, doing: _Doing) -> Exception:
        """Return what the user is told of an exception in a worker."""
        cause = error.cause
        if isinstance(cause, (UserError, StageError)):
            return cause
        where = self._pieces[doing.position].name if doing.what == "piece" else "workers, before their first piece"
        return StageError(f"{where}: {type(cause).__name__}: {cause}; fix the cause and run the same command again")

    def _require_room(self) -> None:
        """Raise if nobody has a place, and has not had for too long."""
        nobody = not self._idle and all(doing.what == "begin" for doing in self._under_way.values())
        if nobody and time.monotonic() - self._heard_s > self._patience_s:
            raise no_place(self._share, self._patience_s)


def no_place(share: Share, waited_s: float) -> StageError:
    """Return what to raise when not even one worker has found room on the cluster."""
    has = ", ".join(str(node) for node in machines()) or "no machine"
    return StageError(
        f"workers: got no room for one of {share} in {waited_s:g} s; expected room on a cluster of {has}; "
        "fix: smaller workers, wait until others have left the cluster, or raise cluster.queue_timeout_s if machines may still come"
    )


def _reason(error: RayError) -> str:
    """Return the kind of a loss; the rest of Ray's text is a page."""
    return type(error).__name__
