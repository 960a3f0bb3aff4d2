"""The pieces of `prepare` as Ray tasks."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from linearsr_platform.cluster.capacity import Room, Share
from linearsr_platform.cluster.crew import no_place
from linearsr_platform.cluster.device import own_device
from linearsr_platform.cluster.experts import machines
from linearsr_platform.data.executor import P, R
from linearsr_platform.errors import StageError, UserError

IN_FLIGHT = 2
"""Tasks that are under way or wait, for each that the cluster has room for: none idles, and what waits for the driver stays small."""
LOOK_S = 5.0
"""Between two looks at how much room the cluster has."""
ONE_CPU = Share(cpus=1.0)
RETRIES = 5
"""Times that a task is done again whose worker or machine was lost."""


class RayExecutor:
    """Does pieces of work as Ray tasks on the cluster that this process is connected to."""

    def __init__(self, share: Share = ONE_CPU, *, environment: Mapping[str, str] | None = None, patience_s: float = 600.0) -> None:
        """Start nothing yet.

        Args:
            share: what each task reserves.
            environment: variables that tasks have beside the cluster's.
            patience_s: how long to wait for a machine that has room for one.
        """
        self._share, self._environment, self._patience_s = share, dict(environment or {}), patience_s

    def map_unordered(self, function: Callable[[P], R], pieces: Sequence[P]) -> Iterator[tuple[int, R]]:
        """Yield (position, result) of every piece, as they come; those that are under way are stopped if the caller stops.

        Raises:
            UserError: as the function does.
            StageError: as the function does, or naming the piece whose task broke down in another way; also if no machine has room.
        """
        if not pieces:
            return
        more: dict[str, Any] = {"runtime_env": {"env_vars": self._environment}} if self._environment else {}
        share = self._share
        work: Any = ray.remote(
            num_cpus=share.cpus, num_gpus=share.gpus, memory=int(share.memory_bytes), max_retries=RETRIES, **more
        )(_apply)  # fmt: skip
        shared = ray.put(function)
        waiting = iter(range(len(pieces)))
        under_way: dict[ray.ObjectRef[R], int] = {}
        limit, next_look_s, had_room_s = 0, float("-inf"), time.monotonic()
        try:
            while True:
                if (now_s := time.monotonic()) >= next_look_s:
                    # Again and again: what waits makes a cluster grow, which may have no room to begin with.
                    room = Room(nodes=machines()).workers(share)
                    limit, next_look_s, had_room_s = IN_FLIGHT * max(1, room), now_s + LOOK_S, now_s if room else had_room_s
                    if now_s - had_room_s > self._patience_s:
                        raise no_place(share, self._patience_s)
                while len(under_way) < limit and (position := next(waiting, None)) is not None:
                    under_way[work.remote(shared, pieces[position])] = position
                if not under_way:
                    return
                ready, _ = ray.wait(list(under_way), num_returns=1, timeout=LOOK_S)
                for reference in ready:
                    position = under_way.pop(reference)
                    yield position, _result(reference, pieces[position].name)
        finally:
            for reference in under_way:
                ray.cancel(reference)


def _apply(function: Callable[[P], R], piece: P) -> R:
    """Run in a worker; refuse to do on a CPU what a GPU was reserved for."""
    own_device()
    return function(piece)


def _result(reference: "ray.ObjectRef[R]", name: str) -> R:
    try:
        result: R = ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, (UserError, StageError)):
            raise cause from error
        raise StageError(f"{name}: {type(cause).__name__}: {cause}; fix the cause and run the same command again") from error
    except RayError as error:
        raise StageError(
            f"{name}: its worker was lost {RETRIES + 1} times: killed, out of memory, or its machine gone ({type(error).__name__}); "
            "fix: a machine with more memory, or smaller photographs; what is finished is kept"
        ) from error
    return result
