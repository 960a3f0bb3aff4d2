"""Rehearsals of a failure: workers that write down what they are fed, and one that is killed. Imports no Ray.

Each step has a file for each worker, written anew when a resumed run takes the step again: what is there at a run's end is what its
result was made of.
"""

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Self

from linearsr_platform import storage
from linearsr_platform.data.reader import Trace
from linearsr_platform.errors import StageError
from linearsr_platform.train.checkpoint_store import find, names_in, parse_checkpoint_name
from linearsr_platform.train.job import Rehearsal

if TYPE_CHECKING:
    # Brings DeepSpeed, which who only reads what was written need not wait for.
    from linearsr_platform.train.protocols import Batch, BatchSource

Draw = tuple[str, int, int]
"""Key of a sample, epoch, and number among the crops of its image in this epoch; with the seed it decides the crop and its degradation."""
KILLED_FILE = "killed.json"
POLL_S = 0.05
CHECKPOINT_S = 60.0
"""How long the worker that is to be killed waits for a checkpoint to go on from."""


class RehearsedBatches:
    """Satisfies `train.protocols.BatchSource`: passes batches on, writes down what they are made of, and kills this process when due."""

    def __init__(
        self, make: "Callable[[Trace | None], BatchSource]", rehearsal: Rehearsal, *, rank: int, world_size: int, checkpoints: str
    ) -> None:
        """Pass on the batches of the source that `make` gives, which tells the function that it is given of every crop.

        Args:
            make: makes the source.
            rehearsal: what is asked.
            rank: number of this worker.
            world_size: workers.
            checkpoints: folder of the job's checkpoints.
        """
        self._draws: list[Draw] = []
        self._step: list[list[Draw]] = []
        self._inner: Any = make(lambda key, epoch, draw: self._draws.append((key, epoch, draw)))
        self._rehearsal, self._rank, self._workers, self._checkpoints = rehearsal, rank, world_size, checkpoints
        self._began = 0

    def __iter__(self) -> Self:
        """Return itself."""
        return self

    def __next__(self) -> "Batch":
        """Return the next micro-batch."""
        step = int(self._inner.state()["step"]) + 1
        self._draws.clear()
        batch: Batch = next(self._inner)
        self._step.append(list(self._draws))
        if int(self._inner.state()["step"]) == step:
            storage.write_json(_file(self._rehearsal.url, step, self._rank), {"workers": self._workers, "micro_batches": self._step})
            self._step = []
        if self._rehearsal.kill == (self._rank, step):
            self._die_once(step)
        return batch

    def state(self) -> dict[str, object]:
        """Return where the source is."""
        state: dict[str, object] = self._inner.state()
        return state

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue the source."""
        self._step = []
        self._inner.restore(states)
        self._began = int(self._inner.state()["step"])

    def close(self) -> None:
        """End the source's processes."""
        self._inner.close()

    def _die_once(self, step: int) -> None:
        note = storage.join(self._rehearsal.url, KILLED_FILE)
        if storage.exists(note):
            return
        until = monotonic() + CHECKPOINT_S
        # Threads write it, this worker's too, while the others wait for this one in the step.
        while not self._has_checkpoint() and monotonic() < until:
            sleep(POLL_S)
        storage.write_json(note, {"worker": self._rank, "step": step})
        os.kill(os.getpid(), signal.SIGKILL)

    def _has_checkpoint(self) -> bool:
        """Say whether there is a complete checkpoint of this attempt."""
        names = (name for name in names_in(self._checkpoints) if parse_checkpoint_name(name)[0] > self._began)
        return any(find(self._checkpoints, name) for name in names)


def was_killed(url: str) -> bool:
    """Tell whether the worker that a rehearsal was to kill has been killed."""
    return storage.exists(storage.join(url, KILLED_FILE))


def read_draws(url: str, step: int) -> list[list[list[Draw]]]:
    """Return what the batch of a step was made of: micro-batches of each worker, and the draws of each.

    Raises:
        StageError: if a worker has not written it down.
    """
    workers: list[list[list[Draw]]] = []
    count = 1
    while len(workers) < count:
        file = _file(url, step, len(workers))
        if not storage.exists(file):
            raise StageError(f"{file}: got no such file; expected what worker {len(workers)} was fed in step {step}")
        found: Any = storage.read_json(file)
        count = found["workers"]
        workers.append([[(key, epoch, draw) for key, epoch, draw in micro] for micro in found["micro_batches"]])
    return workers


def global_batch(workers: Sequence[Sequence[Sequence[Draw]]]) -> list[Draw]:
    """Return the draws of a step in the order that belongs to the run: micro-batch by micro-batch, and in each worker by worker."""
    return [draw for micro in zip(*workers, strict=True) for part in micro for draw in part]


def _file(url: str, step: int, rank: int) -> str:
    return storage.join(url, f"step_{step:08d}", f"rank_{rank}.json")
