"""Training experts in a process that is already warm, through the loop of a real run, and the store in which they are found again.

A trainer of Ray Train costs about 13 CPU seconds to start and stop, more than a trial's training. Processes that stay pay that once.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from pydantic import TypeAdapter

from linearsr.guard import Trip
from linearsr.knee import KneeDecision
from linearsr_platform import storage
from linearsr_platform.cluster.record import claim_folder, finished_outcome
from linearsr_platform.cluster.worker import crop_reader, keep_mlflow_out, validation_batches
from linearsr_platform.recipe.identity import stable_hash
from linearsr_platform.train.job import TrainJob
from linearsr_platform.train.outcome import TrainOutcome
from linearsr_platform.train.protocols import Observer

OnExpert = Callable[[int | None], None]
ObserverOf = Callable[[int], Observer]
"""From the number of an expert to who is told how its training goes."""

CHECKPOINTS = "checkpoints"
"""Folder of the last checkpoint beside an expert's outcome, for a longer training to go on from, which deletes it when it is done."""
WAIT_S = 0.3
"""Time between two looks at an expert that another trial is training."""


@dataclass(frozen=True, kw_only=True)
class ExpertStore:
    """What the experts of a search have in common, and where the trained ones are."""

    template: TrainJob
    """An expert's job without name, interval, steps, seed and folder; trained by one worker."""
    url: str
    """Folder of all trained experts, each under the hash of everything that decides its weights."""
    origin: Mapping[str, str]
    """What tells apart the data and the weights that experts start from: the template names places, where others may be later."""

    def job(self, interval: tuple[float, float], *, steps: int, seed: int) -> TrainJob:
        """Describe the training of one expert; the same arguments give the same name and folder."""
        # Measured at the start, which the guard needs, and at the end: a trial is judged by its experts together.
        # One checkpoint at a time: of a network of 1.6 G parameters it has 26 GB, and it stays until a longer training has gone on from it.
        often = min(steps, self.template.train.checkpoint_every)
        changed = {"max_steps": steps, "validate_every": steps, "checkpoint_every": often, "keep_checkpoints": 1}
        train = self.template.train.model_copy(update=changed)
        task_config: Any = self.template.task_config
        job = replace(self.template, train=train, task_config=replace(task_config, interval=interval), seed=seed)
        content = TypeAdapter(TrainJob).dump_python(job, mode="json", exclude={"name", "output_url"})
        name = f"expert-{stable_hash({**content, 'train': train.decisive(), 'origin': dict(self.origin)})[:16]}"
        return replace(job, name=name, output_url=storage.join(self.url, name))


def train_here(job: TrainJob, *, before: TrainJob | None = None, observer: Observer | None = None) -> TrainOutcome:
    """Train a job in this process as its only worker; one that was trained before is not trained again.

    Args:
        job: what to do; of one worker. Where it was interrupted, it goes on from its last checkpoint.
        before: the same training with fewer steps; if its last checkpoint is in the store, this one goes on from there.
        observer: who is told how it goes; None is nobody.
    """
    outcome = finished_outcome(job)
    if outcome is not None:
        return outcome
    try:
        return _train(job, before, observer or Silence())
    finally:
        # An engine and its network are full of reference cycles, and Python looks for those by the number of new objects, not by their
        # size: an expert of 60 M parameters left 2.6 GB behind, which the next one found taken.
        gc.collect()


def _train(job: TrainJob, before: TrainJob | None, observer: Observer) -> TrainOutcome:
    # After mlflow was put out of DeepSpeed's reach.
    keep_mlflow_out()
    from linearsr_platform.train.engine import DeepSpeedEngine
    from linearsr_platform.train.loop import run_training

    claim_folder(job)
    task = job.build_task()
    batches = crop_reader(job, task, rank=0, world_size=1)
    validation = validation_batches(task, job.validation, job.validation_shards)
    engine = DeepSpeedEngine(task, job.train, seed=job.seed, init_weights=job.init_weights)
    # An expert that came from a trainer of Ray Train has no checkpoints there.
    earlier = None if before is None or finished_outcome(before) is None else storage.join(before.output_url, CHECKPOINTS)
    try:
        own = storage.join(job.output_url, CHECKPOINTS)
        return run_training(engine, batches, validation, job, observer, checkpoints=own, before=earlier)
    finally:
        engine.close()


class Silence:
    """Satisfies `train.protocols.Observer`: tells nobody anything."""

    def on_start(self, step: int) -> None:
        """Say nothing."""

    def on_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Say nothing."""

    def on_validation(self, step: int, values: Mapping[str, float], decision: KneeDecision) -> None:
        """Say nothing."""

    def on_trip(self, step: int, trip: Trip) -> None:
        """Say nothing."""

    def on_checkpoint(self, step: int) -> None:
        """Say nothing."""

    def on_message(self, step: int, text: str) -> None:
        """Say nothing."""


class Claims:
    """Handle of the list of experts that somebody is training, so that nobody else does; picklable."""

    def __init__(self, actor: Any) -> None:
        """Wrap a running actor; use `start`."""
        self._actor = actor

    @classmethod
    def start(cls) -> "Claims":
        """Start an empty list."""
        return cls(ray.remote(_Claims).options(num_cpus=0).remote())

    def take(self, name: str, owner: str) -> bool:
        """Claim an expert for a trial; False if another one has it."""
        return bool(ray.get(self._actor.take.remote(name, owner)))

    def release(self, owner: str) -> None:
        """Give up all claims of a trial."""
        ray.get(self._actor.release.remote(owner))

    def close(self) -> None:
        """Stop the list's process."""
        ray.kill(self._actor)


class _Claims:
    """The actor's state."""

    def __init__(self) -> None:
        self._owners: dict[str, str] = {}

    def take(self, name: str, owner: str) -> bool:
        return self._owners.setdefault(name, owner) == owner

    def release(self, owner: str) -> None:
        self._owners = {name: other for name, other in self._owners.items() if other != owner}


def train_all(
    jobs: Sequence[TrainJob],
    before: Sequence[TrainJob | None],
    *,
    claims: Claims,
    owner: str,
    on_expert: OnExpert,
    observer_of: ObserverOf = lambda index: Silence(),
    last: bool = False,
) -> list[TrainOutcome]:
    """Train the experts of one trial one after the other, those that nobody else is at first.

    A trial holds one claim at a time and none while it waits, so that two of them never wait for each other.

    Args:
        jobs: one for each expert, noisiest first.
        before: for each the same training with fewer steps, or None.
        claims: of all trials.
        owner: id of this trial.
        on_expert: called with the number of an expert before it is trained, and with None while waiting.
        observer_of: who is told how the training of an expert goes.
        last: whether none of the search goes on from these, so that their checkpoints need not stay.
    """
    outcomes: dict[int, TrainOutcome] = {}
    while len(outcomes) < len(jobs):
        open_jobs = [index for index in range(len(jobs)) if index not in outcomes]
        found = {index: outcome for index in open_jobs if (outcome := finished_outcome(jobs[index])) is not None}
        outcomes |= found
        mine = next((index for index in open_jobs if index not in found and claims.take(jobs[index].name, owner)), None)
        if mine is not None:
            on_expert(mine)
            try:
                outcomes[mine] = train_here(jobs[mine], before=before[mine], observer=observer_of(mine))
                for used in (before[mine], jobs[mine] if last else None):
                    if used is not None:
                        storage.remove(storage.join(used.output_url, CHECKPOINTS))
            finally:
                claims.release(owner)
        elif len(outcomes) < len(jobs):
            on_expert(None)
            time.sleep(WAIT_S)
    return [outcomes[index] for index in range(len(jobs))]
