"""Does a training that is interrupted end where one that is not ends? Asked of a job, in a few steps through the real trainers.

The job is trained twice. In one of the two a worker is killed in the middle, and the trainer goes on from a checkpoint. Then everything
that decides how training would go on is compared bit for bit: what the last checkpoint holds, what every worker was fed, and the numbers
of every step. A third training may take a checkpoint of the undisturbed one and go on with another number of workers.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

import torch

from linearsr_platform import storage
from linearsr_platform.cluster.board import Event, ProgressBoard
from linearsr_platform.cluster.experts import OnPoll, TrainerFailure, fit_all
from linearsr_platform.cluster.record import checkpoints_url
from linearsr_platform.cluster.rehearsal import Draw, global_batch, read_draws, was_killed
from linearsr_platform.errors import StageError, UserError
from linearsr_platform.recipe.schema import ClusterConfig
from linearsr_platform.stages.jobs import trainers_failed
from linearsr_platform.train.checkpoint_contents import digests, newest_checkpoint, whole
from linearsr_platform.train.checkpoint_store import Found, checkpoint_name
from linearsr_platform.train.job import Rehearsal, TrainJob
from linearsr_platform.train.outcome import TrainOutcome

CHECKPOINTS = 3
"""Checkpoints of each training; the worker is killed after the first."""
LEAST_STEPS = CHECKPOINTS
UNDISTURBED, INTERRUPTED = "undisturbed", "interrupted"
HASH_SHOWN = 12
KINDS = {
    "weight": "weights",
    "average": "averaged weights (EMA)",
    "exp_avg": "AdamW's first moments",
    "exp_avg_sq": "AdamW's second moments",
    "generator": "noise generators",
    "buffer": "buffers",
    "frozen": "frozen weights",
}
"""What each kind of numbers in a checkpoint is to people."""
NUMBERS = {"lr": "learning rate of every step", "loss": "loss of every step", "grad_norm": "gradient norm of every step"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that two trainings must have in common."""

    what: str
    undisturbed: str
    """Hash of it in the one, 12 hex digits."""
    resumed: str
    equal: bool
    first_step: int | None = None
    """First step in which they differ, where it is known."""


@dataclass(frozen=True, kw_only=True)
class OtherWorkers:
    """What going on with another number of workers gave."""

    workers: int
    resumed_at: int
    rows: tuple[Row, ...]
    """What must be the same whatever their number."""
    weights_apart: float
    """Norm of the difference of the last weights over that of the weights."""
    average_apart: float
    loss_apart: float
    """Largest difference of the loss in a step. Noise is drawn by each worker, so training's own chance is in it."""


@dataclass(frozen=True, kw_only=True)
class ResumeCheck:
    """What a check came to."""

    steps: int
    workers: int
    killed: tuple[int, int]
    """Worker, and the step in which it was killed."""
    resumed_at: int
    rows: tuple[Row, ...]
    other: OtherWorkers | None = None

    @property
    def equal(self) -> bool:
        """Whether all is as it must be."""
        rows = [*self.rows, *(self.other.rows if self.other is not None else ())]
        return all(row.equal for row in rows)


@dataclass(frozen=True, kw_only=True)
class _Training:
    """What is left of one small training."""

    steps: int
    first_step: int
    """Where its last attempt began."""
    checkpoint: Found
    numbers: Mapping[int, Mapping[str, float]]
    history: list[dict[str, float]]
    draws: Mapping[int, list[list[list[Draw]]]]


def choose_kill(workers: int, steps: int, chance: Random) -> tuple[int, int]:
    """Return a random worker, and a random step after the first checkpoint of `steps` steps."""
    return chance.randrange(workers), chance.randint(_interval(steps) + 1, steps)


def check_resume(
    job: TrainJob, cluster: ClusterConfig, *, url: str, steps: int, kill: tuple[int, int], other_workers: int | None, on_poll: OnPoll
) -> ResumeCheck:
    """Train a job for a few steps undisturbed and interrupted, and compare.

    Args:
        job: whose task, data and settings are used; its name and folder are not.
        cluster: how much each worker gets; must be connected.
        url: folder for all that is written. The caller removes it.
        steps: of each training, at least `LEAST_STEPS`.
        kill: from `choose_kill`.
        other_workers: also go on with this number of workers; None leaves that out.
        on_poll: called about three times a second with new events.

    Raises:
        StageError: if a training failed, or nobody was killed. A `UserError` instead if it is a mistake of the user.
    """
    settings = {"max_steps": steps, "validate_every": steps, "checkpoint_every": _interval(steps), "keep_checkpoints": steps}
    always = {"log_every": 1, "max_seconds": None, "min_workers": None, "max_failures": 3}
    knee = job.train.knee.model_copy(update={"stop": False})
    job = replace(job, train=job.train.model_copy(update={**settings, **always, "knee": knee}))
    jobs = [_rehearsed(job, name, url, kill if name == INTERRUPTED else None) for name in (UNDISTURBED, INTERRUPTED)]
    one, other = _train(jobs, cluster, url, on_poll)
    if not was_killed(_rehearsal_url(url, INTERRUPTED)) or other.first_step == 0:
        raise StageError(f"resume: got a training from step {other.first_step}; expected one killed after a checkpoint; fix: more --steps")
    elsewhere = None if other_workers is None else _on_other_workers(jobs[0], one, other_workers, cluster, url, on_poll)
    rows = tuple(_rows(one, other))
    return ResumeCheck(steps=steps, workers=job.train.workers, killed=kill, resumed_at=other.first_step, rows=rows, other=elsewhere)


def _on_other_workers(job: TrainJob, one: _Training, workers: int, cluster: ClusterConfig, url: str, on_poll: OnPoll) -> OtherWorkers:
    """Go on from the undisturbed training's first checkpoint."""
    moved = _rehearsed(replace(job, train=job.train.on_workers(workers)), f"on-{workers}-workers", url, None)
    first = checkpoint_name(_interval(one.steps), 0)
    target = storage.join(checkpoints_url(_storage_url(url), moved), first)
    storage.copy_tree(storage.join(storage.parent(one.checkpoint.url), first), target)
    (other,) = _train([moved], cluster, url, on_poll)
    if other.first_step == 0:
        raise StageError(f"resume: got a training on {workers} workers from step 0; expected one that goes on from {target}")
    after = range(other.first_step + 1, one.steps + 1)
    batches = [{step: global_batch(training.draws[step]) for step in after} for training in (one, other)]
    rates = [{step: training.numbers.get(step, {}).get("lr") for step in after} for training in (one, other)]
    both = [step for step in after if step in one.numbers and step in other.numbers]
    losses = [abs(one.numbers[step]["loss"] - other.numbers[step]["loss"]) for step in both]
    return OtherWorkers(
        workers=workers,
        resumed_at=other.first_step,
        rows=(_series_row("crops of every global batch, in order", *batches), _series_row(NUMBERS["lr"], *rates)),
        weights_apart=_apart(one, other, "weight"),
        average_apart=_apart(one, other, "average"),
        loss_apart=max(losses, default=float("inf")),
    )


def _rehearsed(job: TrainJob, name: str, url: str, kill: tuple[int, int] | None) -> TrainJob:
    return replace(job, name=name, output_url=storage.join(url, "out", name), rehearsal=Rehearsal(url=_rehearsal_url(url, name), kill=kill))


def _rehearsal_url(url: str, name: str) -> str:
    return storage.join(url, "fed", name)


def _storage_url(url: str) -> str:
    return storage.join(url, "ray")


def _interval(steps: int) -> int:
    return steps // CHECKPOINTS


def _train(jobs: Sequence[TrainJob], cluster: ClusterConfig, url: str, on_poll: OnPoll) -> list[_Training]:
    """Train jobs to their ends, and gather what is left of them; where a step was taken twice, it is the second time that counts."""
    numbers: dict[str, dict[int, Mapping[str, float]]] = {job.name: {} for job in jobs}
    starts: dict[str, int] = {}

    def listen(events: list[Event]) -> None:
        for event in events:
            if event.kind == "start":
                starts[event.source] = event.step
            elif event.kind == "metrics":
                numbers[event.source][event.step] = event.values
        on_poll(events)

    board = ProgressBoard.start()
    try:
        outcomes = fit_all(jobs, cluster, storage_url=_storage_url(url), board=board, on_poll=listen, keep_checkpoints=True)
        listen(board.drain())
    finally:
        board.close()
    failed = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, TrainerFailure)}
    done = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, TrainOutcome)}
    if failed:
        raise trainers_failed(failed, {})
    found = []
    for job in jobs:
        began = starts[job.name]
        checkpoint = newest_checkpoint(checkpoints_url(_storage_url(url), job))
        # A training that took over another's checkpoint has not been fed before it.
        first = 1 if job.name in (UNDISTURBED, INTERRUPTED) else began + 1
        draws = {step: read_draws(_rehearsal_url(url, job.name), step) for step in range(first, job.train.max_steps + 1)}
        outcome = done[job.name]
        found.append(
            _Training(
                steps=outcome.steps,
                first_step=began,
                checkpoint=checkpoint,
                numbers=numbers[job.name],
                history=outcome.history,
                draws=draws,
            )
        )
    return found


def _rows(one: _Training, other: _Training) -> list[Row]:
    """Compare two trainings in all that must be the same bit for bit."""
    ours, theirs = digests(one.checkpoint), digests(other.checkpoint)
    kinds = [kind for kind in (*KINDS, *ours.keys(), *theirs.keys()) if kind in ours or kind in theirs]
    rows = [_row(KINDS.get(kind, kind), ours.get(kind, ""), theirs.get(kind, "")) for kind in dict.fromkeys(kinds)]
    for what, field in (("AdamW's number of steps", "optimizer_step"), ("place of the readers", "batches")):
        states = [_digest([record[field] for record in training.checkpoint.records]) for training in (one, other)]
        rows.append(_row(what, *states))
    rows.append(_series_row("crops of every worker: keys, epochs, draws", one.draws, other.draws))
    steps = range(1, max(one.steps, other.steps) + 1)
    for name, what in NUMBERS.items():
        series = [{step: training.numbers.get(step, {}).get(name) for step in steps} for training in (one, other)]
        rows.append(_series_row(what, *series))
    rows.append(_row("validations", _digest(one.history), _digest(other.history)))
    return rows


def _row(what: str, one: str, other: str) -> Row:
    return Row(what=what, undisturbed=one[:HASH_SHOWN], resumed=other[:HASH_SHOWN], equal=one == other and one != "")


def _series_row(what: str, one: Mapping[int, object], other: Mapping[int, object]) -> Row:
    """Compare what there is for every step; a step that nothing is known of is not the same as anything."""
    steps = sorted({*one, *other})
    different = [step for step in steps if one.get(step) is None or one.get(step) != other.get(step)]
    row = _row(what, _digest(one), _digest(other))
    return replace(row, equal=row.equal and not different, first_step=different[0] if different else None)


def _digest(value: object) -> str:
    """Return the sha256 of a value's text; that of a float is exact, and there is one for NaN."""
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _apart(one: _Training, other: _Training, kind: str) -> float:
    ours, theirs = whole(one.checkpoint, kind), whole(other.checkpoint, kind)
    if ours.keys() != theirs.keys():
        raise StageError(f"resume: got other {KINDS[kind]} in {other.checkpoint.url}; expected those of {one.checkpoint.url}")
    difference = torch.cat([ours[name].double() - theirs[name].double() for name in ours]).norm()
    return float(difference / torch.cat([part.double() for part in ours.values()]).norm())


def refuse_steps(steps: int) -> None:
    """Refuse too few steps to have a checkpoint in the middle.

    Raises:
        UserError: saying how many it takes.
    """
    if steps < LEAST_STEPS:
        raise UserError(f"--steps: got {steps}; expected at least {LEAST_STEPS}; fix: --steps {4 * LEAST_STEPS}")
