"""Full checkpoints: everything that a resumed run needs to go on as if it had never stopped, on any number of workers and ZeRO stage.

Training stands still only while each worker copies what it owns to host memory; a thread writes it from there. Of each parameter a
checkpoint holds float32 weight, AdamW's two moments and the average of weights (16 bytes a parameter, over all workers), and of each worker
its noise generator and place in the data. Where it is, and when it is complete: `linearsr_platform.train.checkpoint_store`.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import numpy as np

from linearsr.guard import Trip
from linearsr_platform import storage
from linearsr_platform.errors import StageError
from linearsr_platform.train.checkpoint_file import Shards, Staging, Written, damage, overlaps
from linearsr_platform.train.checkpoint_store import Found, checkpoint_name, find, names_in, record_file, weights_file
from linearsr_platform.train.ema import ExponentialAverage
from linearsr_platform.train.processes import collect, rank, world_size
from linearsr_platform.train.protocols import BatchSource, Engine
from linearsr_platform.train.spans import Span

GENERATOR = "generator"
FAILURES_IN_A_ROW = 5
"""Checkpoints that could not be written after which a run ends: it could lose more than anybody expects."""


@dataclass(kw_only=True)
class LoopState:
    """What the loop itself remembers; JSON, the same on every worker but for times."""

    step: int = 0
    """Optimizer steps taken."""
    seconds: float = 0.0
    """Wall-clock time in the loop as worker 0 saw it, over all restarts."""
    train_seconds: float = 0.0
    """The part of it spent on steps."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Every validation: `step` and its metrics."""
    trips: list[Trip] = field(default_factory=list)
    """Every trip of the guard so far, those of rolled-back steps too."""
    messages: list[str] = field(default_factory=list)
    """What went wrong and did not stop training: checkpoints that could not be written or read."""
    guard: dict[str, Any] = field(default_factory=dict)
    """What the guard's limits come from, as of the last checkpoint; empty where it is off, and in checkpoints of older versions."""


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    step: int
    name: str
    written: Future[None]


class Checkpoints:
    """The checkpoints of one job. Every worker has one and calls its methods equally often."""

    def __init__(
        self,
        url: str,
        engine: Engine,
        average: ExponentialAverage,
        *,
        keep: int,
        codec: str | None,
        seed: int,
        on_complete: Callable[[int], None],
        on_message: Callable[[str], None],
    ) -> None:
        """Be ready to restore and then to save.

        Args:
            url: folder of the job's checkpoints.
            engine: whose state is kept.
            average: of its weights.
            keep: complete checkpoints to keep; older ones are deleted.
            codec: hash of the codec that the network was trained with; None where there is none.
            seed: of the job; new noise generators are derived from it when the number of workers has changed.
            on_complete: called on every worker with the step of a checkpoint that training would from now on resume from.
            on_message: called on every worker with what could not be written.
        """
        self._url, self._engine, self._average = url, engine, average
        self._keep, self._codec, self._seed = keep, codec, seed
        self._on_complete, self._on_message = on_complete, on_message
        self._attempt = str(collect(uuid4().hex)[0])
        self._staging = Staging()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self._failures = 0
        self._complete: list[str] = []
        self._obsolete: list[str] = []

    def restore(self, batches: BatchSource, *, before: str | None = None) -> tuple[LoopState | None, list[str]]:
        """Go on from the newest checkpoint that is whole, and delete what is newer or was never finished.

        Every file is checked by one worker at least, and by all that read it. A damaged checkpoint is passed over.

        Args:
            batches: this worker's; put where they were.
            before: folder of another job's checkpoints to start from if this one has none.

        Returns:
            The loop's state, None if there is no checkpoint, and what there is to say about damaged ones.

        Raises:
            StageError: if the checkpoint was written with another codec, whose latents mean something else, or of another network.
        """
        said: list[str] = []
        state = self._restore_newest(self._url, batches, said)
        if rank() == 0:
            self._tidy(None if state is None else checkpoint_name(state.step, len(state.trips)))
        if state is None and before is not None:
            state = self._restore_newest(before, batches, said)
        if state is None and said:
            said[-1] += "; there is none before it, starting over"
        return state, said

    def save(self, state: LoopState, batches: BatchSource) -> None:
        """Copy this worker's share of a checkpoint and begin to write it, once the one before is written.

        Raises:
            StageError: if too many in a row could not be written.
        """
        self.settle(wait_for_it=True)
        name, spans = checkpoint_name(state.step, len(state.trips)), self._spans()
        written = [span.share(rank(), world_size()) if span.replicated else span for span in spans]
        written = [span for span in written if span.values.numel()]
        generator = self._engine.generator.get_state()
        self._staging.fill([*written, Span(GENERATOR, tuple(generator.shape), 0, generator, replicated=False)])
        record = {
            "workers": world_size(),
            "attempt": self._attempt,
            "zero_stage": self._engine.zero_stage,
            "precision": self._engine.precision,
            "codec": self._codec,
            "optimizer_step": self._engine.optimizer_step(),
            "batches": batches.state(),
            "loop": asdict(state) if rank() == 0 else None,
            "runs": {span.key: {"shape": list(span.shape), "start": span.start, "stop": span.stop} for span in written},
        }
        folder = storage.join(self._url, name)
        self._pending = _Pending(state.step, name, self._thread.submit(_write, folder, rank(), self._staging, record))

    def settle(self, *, wait_for_it: bool) -> None:
        """Find out whether the checkpoint that is being written has become complete, and say so; does nothing if there is none.

        Raises:
            StageError: if too many in a row could not be written.
        """
        pending = self._pending
        if pending is None:
            return
        if wait_for_it:
            wait([pending.written])
        told = cast("list[tuple[bool, str | None]]", collect(_progress(pending.written)))
        if not all(done for done, _ in told):
            return
        self._pending = None
        errors = [f"worker {worker}: {error}" for worker, (_, error) in enumerate(told) if error is not None]
        if errors:
            self._prune([pending.name])
            self._fail(pending, errors)
        else:
            self._failures = 0
            self._complete.append(pending.name)
            self._prune([])
            self._on_complete(pending.step)

    def close(self) -> None:
        """Wait for the thread to end its work."""
        self._thread.shutdown(wait=True)

    def _spans(self) -> list[Span]:
        return [*self._engine.spans(), *self._average.spans()]

    def _fail(self, pending: _Pending, errors: Sequence[str]) -> None:
        self._failures += 1
        reason = "; ".join(errors)
        if self._failures == FAILURES_IN_A_ROW:
            raise StageError(
                f"checkpoints: got {FAILURES_IN_A_ROW} in a row that could not be written to {self._url}, the last for {reason}; "
                "expected a place with room; fix: make room there, or set storage to another place"
            )
        kept = f"a restart would go on from {self._complete[-1]}" if self._complete else "there is none yet to go on from after a restart"
        self._on_message(f"checkpoint {pending.name} could not be written ({reason}); training goes on, {kept}")

    def _prune(self, failed: Sequence[str]) -> None:
        """Let the thread of worker 0 delete what failed and what is too old; nobody is writing now, so all of it is dead."""
        dead = [*failed, *self._complete[: -self._keep]]
        self._complete = self._complete[-self._keep :]
        if rank() == 0 and dead:
            self._obsolete += [storage.join(self._url, name) for name in dead]
            self._thread.submit(_remove_all, self._obsolete)

    def _tidy(self, newest: str | None) -> None:
        """Delete what an earlier attempt left: what is newer than the checkpoint to go on from, and what was never finished."""
        names = names_in(self._url)
        older = names[names.index(newest) :] if newest is not None else []
        whole = [name for name in older if name == newest or find(self._url, name) is not None]
        for name in names:
            if name not in whole[: self._keep]:
                storage.remove(storage.join(self._url, name))
        self._complete = whole[: self._keep][::-1]

    def _restore_newest(self, url: str, batches: BatchSource, said: list[str]) -> LoopState | None:
        candidates = (found for name in names_in(url) if (found := find(url, name)) is not None) if rank() == 0 else iter(())
        while (found := cast("Found | None", collect(next(candidates, None))[0])) is not None:
            with self._files(found) as (paths, problem):
                problems = [one for one in collect(problem) if one is not None]
                if not problems:
                    said[-1:] = [f"{text}, going on from {found.name}" for text in said[-1:]]
                    return self._load(found, paths, batches)
            said.append(f"checkpoint {found.name} is damaged ({problems[0]})")
        return None

    @contextmanager
    def _files(self, found: Found) -> Iterator[tuple[dict[int, Path], str | None]]:
        """Give local paths of the files that this worker reads, and what is wrong with those that it checks."""
        if found.damage is not None:
            yield {}, found.damage
            return
        runs = [record["runs"] for record in found.records]
        needed = {worker for span in self._spans() for worker, _, _ in overlaps(runs, span)}
        needed |= {*range(rank(), len(runs), world_size())}
        with ExitStack() as stack:
            paths: dict[int, Path] = {}
            for worker in sorted(needed):
                file, record = weights_file(found.url, worker), found.records[worker]
                # Before anything is fetched, because that may take long and the file may not be there.
                if not storage.exists(file):
                    yield {}, f"{storage.name_of(file)} is missing"
                    return
                paths[worker] = stack.enter_context(storage.local_path(file))
                if (problem := damage(paths[worker], Written(record["bytes"], record["hash"]))) is not None:
                    yield {}, f"{storage.name_of(file)} {problem}"
                    return
            yield paths, None

    def _load(self, found: Found, paths: dict[int, Path], batches: BatchSource) -> LoopState:
        first, same = found.records[0], len(found.records) == world_size()
        # A checkpoint of a network without codec has none.
        if first["codec"] is not None and first["codec"] != self._codec:
            raise StageError(
                f"checkpoint {found.url}: got codec {first['codec']}; expected {self._codec}; "
                f"fix: name the codec that wrote it in model.codec, or delete it to start over"
            )
        steps = [record["optimizer_step"] for record in found.records if record["optimizer_step"] is not None]
        self._engine.prepare_moments(steps[0] if steps else None)
        state = _state(first["loop"])
        with Shards(paths, [record["runs"] for record in found.records]) as shards:
            missing = [span.key for span in self._spans() if not shards.read(span)]
            if missing:
                raise StageError(
                    f"checkpoint {found.url}: got no {missing[0]}; expected that of this network; fix: delete it to start over"
                )
            if same:
                self._engine.generator.set_state(shards.whole(rank(), GENERATOR))
            else:
                self._engine.generator.manual_seed(_new_seed(self._seed, state.step))
        self._engine.publish()
        batches.restore([record["batches"] for record in found.records])
        return state


def _write(folder: str, worker: int, staging: Staging, record: dict[str, Any]) -> None:
    """Write a worker's share of a checkpoint, and then the record that says it is there."""
    written = staging.write(weights_file(folder, worker))
    storage.write_json(record_file(folder, worker), {**record, **asdict(written)})


def _progress(written: Future[None]) -> tuple[bool, str | None]:
    """Return whether a worker has ended its writing, and its error."""
    if not written.done():
        return False, None
    error = written.exception()
    return True, None if error is None else f"{type(error).__name__}: {error}"


def _remove_all(urls: list[str]) -> None:
    """Delete folders; those that cannot be deleted now stay in the list for the next time."""
    while urls:
        storage.remove(urls[0])
        del urls[0]


def _new_seed(seed: int, step: int) -> int:
    """Return a seed for a noise generator that nobody has left a state for; another one on every worker and at every step."""
    return int(np.random.SeedSequence([seed % 2**64, step, rank(), world_size()]).generate_state(1, np.uint64)[0] % 2**63)


def _state(document: dict[str, Any]) -> LoopState:
    return LoopState(**{**document, "trips": [Trip(**trip) for trip in document["trips"]]})
