"""What a Ray Train worker runs: it builds the parts that the training loop needs and tells the board how it goes."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from traceback import format_exception
from types import TracebackType
from typing import Any, Self

import numpy as np
import ray
import ray.train
import torch

from linearsr.guard import Trip
from linearsr.knee import KneeDecision
from linearsr_platform.cluster.board import ProgressBoard
from linearsr_platform.cluster.gauges import MeteredBatches, MeteredObserver, TrainingGauges
from linearsr_platform.cluster.rehearsal import RehearsedBatches
from linearsr_platform.cluster.sight import require_own_folder
from linearsr_platform.data.reader import CropReader, Lanes, Trace, caption_of, lanes_of, read_images
from linearsr_platform.recipe.train_schema import ValidationConfig
from linearsr_platform.scratch import remove_abandoned
from linearsr_platform.train.job import TrainJob
from linearsr_platform.train.protocols import Batch, Task


def train_worker(config: dict[str, Any]) -> None:
    """Train one job as one worker of a Ray Train group, from the run's last checkpoint if there is one.

    Args:
        config: `job`, a reference to a `TrainJob`; `board`, the `ProgressBoard`; `threads` for torch; `checkpoints`, their folder.
    """
    torch.set_num_threads(config["threads"])
    keep_mlflow_out()
    # Of workers before this one that were killed while they wrote a checkpoint.
    remove_abandoned()
    with _TracebackInNotes():
        job = ray.get(config["job"])
        require_own_folder(job)
        _train(job, config["board"], config["checkpoints"])


def keep_mlflow_out() -> None:
    """Keep DeepSpeed from importing MLflow in this process, which it does if it can, only for its autotuner.

    It costs 1.5 CPU seconds and 130 MB a worker, and workers never use it.
    """
    sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]


class _TracebackInNotes:
    """Writes the traceback of an error into its notes: the error travels to the driver, its traceback would not."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            error.add_note("".join(format_exception(error)))


def _train(job: TrainJob, board: ProgressBoard, checkpoints: str) -> None:
    # After mlflow was put out of DeepSpeed's reach.
    from linearsr_platform.train.engine import DeepSpeedEngine
    from linearsr_platform.train.loop import run_training

    if job.rehearsal is not None and torch.cuda.is_available():
        # Two trainings are compared bit for bit. By themselves some of CUDA's kernels add in whatever order their threads come.
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
    context = ray.train.get_context()
    job = replace(job, train=job.train.on_workers(context.get_world_size()))
    task = job.build_task()
    place = {"rank": context.get_world_rank(), "world_size": context.get_world_size()}

    def source(trace: Trace | None) -> LateReader:
        return LateReader(lambda states: crop_reader(job, task, **place, lanes=None if states is None else lanes_of(states), trace=trace))

    batches = source(None) if job.rehearsal is None else RehearsedBatches(source, job.rehearsal, **place, checkpoints=checkpoints)
    validation = validation_batches(task, job.validation, job.validation_shards)
    engine = DeepSpeedEngine(task, job.train, seed=job.seed, init_weights=job.init_weights)
    gauges = TrainingGauges(run=context.get_experiment_name(), job=job.name, rank=context.get_world_rank())
    observer = MeteredObserver(BoardObserver(board, job.name), gauges)
    try:
        run_training(engine, MeteredBatches(batches, gauges), validation, job, observer, checkpoints=checkpoints)
    finally:
        batches.close()


class LateReader:
    """Satisfies `train.protocols.BatchSource`: makes the reader when it is known what an earlier attempt has read."""

    def __init__(self, make: Callable[[Sequence[Mapping[str, Any]] | None], CropReader]) -> None:
        """Make nothing yet; `make` is given the states of all workers that wrote the checkpoint, or None at a run's first step."""
        self._make = make
        self._reader: CropReader | None = None

    def __iter__(self) -> Self:
        """Return itself."""
        return self

    def __next__(self) -> Batch:
        """Return the next micro-batch."""
        return next(self._opened())

    def state(self) -> dict[str, object]:
        """Return where the reader is."""
        return self._opened().state()

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Make the reader anew, at the place that the states of all workers tell."""
        self.close()
        self._reader = self._make(states)
        self._reader.restore(states)

    def close(self) -> None:
        """End the reader's processes."""
        if self._reader is not None:
            self._reader.close()

    def _opened(self) -> CropReader:
        if self._reader is None:
            self._reader = self._make(None)
        return self._reader


def crop_reader(
    job: TrainJob, task: Task, *, rank: int, world_size: int, lanes: Lanes | None = None, trace: Trace | None = None
) -> CropReader:
    """Return the micro-batches of one of a job's workers.

    Args:
        job: what is trained.
        task: makes the examples.
        rank: the worker's number.
        world_size: workers that there are now; with the accumulation they divide the job's batch.
        lanes: of the run that is resumed, from `lanes_of` of its workers' reader states; None where it starts.
        trace: told of every crop.
    """
    train = job.train
    return CropReader(
        job.train_shards,
        task.transform,
        batch_size=train.batch_size // (world_size * train.accumulation),
        crops_per_image=train.crops_per_image,
        seed=job.seed,
        rank=rank,
        world_size=world_size,
        accumulation=train.accumulation,
        lanes=lanes,
        workers=train.loader_workers,
        cache=job.cache,
        trace=trace,
    )


def validation_batches(task: Task, config: ValidationConfig, shards: Sequence[str]) -> list[Batch]:
    """Make the fixed validation crops, dealt out over the images in turn, as batches; the same in every worker."""
    images = read_images(shards, config.crops)
    examples = []
    for index in range(config.crops):
        _, image, meta = images[index % len(images)]
        examples.append(task.validation_example(image, caption_of(meta), config.crop_px, index))
    chunks = [examples[start : start + config.batch_size] for start in range(0, len(examples), config.batch_size)]
    return [{name: torch.from_numpy(np.stack([example[name] for example in chunk])) for name in chunk[0]} for chunk in chunks]


class BoardObserver:
    """Tells the board what happens."""

    def __init__(self, board: ProgressBoard, source: str) -> None:
        """Speak for the job `source`."""
        self._board = board
        self._source = source
        self._leads = ray.train.get_context().get_world_rank() == 0

    def on_start(self, step: int) -> None:
        """Say that training begins, at `step` if it resumes."""
        self._board.push(self._source, "start", step, {"workers": ray.train.get_context().get_world_size()})

    def on_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Pass on the metrics of the steps since the last call."""
        self._board.push(self._source, "metrics", step, values)

    def on_validation(self, step: int, values: Mapping[str, float], decision: KneeDecision) -> None:
        """Pass on a validation and what the knee detector made of it."""
        self._board.push(self._source, "validation", step, values, decision.to_json())

    def on_trip(self, step: int, trip: Trip) -> None:
        """Pass on a trip of the guard."""
        if self._leads:
            self._board.push(self._source, "trip", step, {}, trip.to_json())

    def on_checkpoint(self, step: int) -> None:
        """Say that a run that is interrupted now resumes at `step`."""
        self._board.push(self._source, "checkpoint", step, {})

    def on_message(self, step: int, text: str) -> None:
        """Pass on what went wrong without stopping training."""
        self._board.push(self._source, "message", step, {}, {"text": text})
