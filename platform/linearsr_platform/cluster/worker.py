"""What a Ray Train worker runs: it builds the parts that the training loop needs and tells the board how it goes."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from traceback import format_exception
from types import TracebackType
from typing import Any, cast

import numpy as np
import ray
import ray.train
import torch

from linearsr.guard import Trip
from linearsr.knee import KneeDecision
from linearsr_platform.cluster.board import ProgressBoard
from linearsr_platform.data.reader import CropReader, Lanes, caption_of, read_images
from linearsr_platform.recipe.train_schema import ValidationConfig
from linearsr_platform.train.job import TrainJob
from linearsr_platform.train.protocols import Batch, BatchSource, Task

CHECKPOINT_PREFIX = "step_"


def train_worker(config: dict[str, Any]) -> None:
    """Train one job as one worker of a Ray Train group, from the run's last checkpoint if there is one.

    Args:
        config: `job`, a reference to a `TrainJob`; `board`, the `ProgressBoard`; `threads` for torch.
    """
    torch.set_num_threads(config["threads"])
    keep_mlflow_out()
    with _TracebackInNotes():
        _train(ray.get(config["job"]), config["board"])


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


def _train(job: TrainJob, board: ProgressBoard) -> None:
    # After mlflow was put out of DeepSpeed's reach.
    from linearsr_platform.train.engine import DeepSpeedEngine
    from linearsr_platform.train.loop import run_training

    context = ray.train.get_context()
    task = job.build_task()
    batches = crop_reader(job, task, rank=context.get_world_rank(), world_size=context.get_world_size())
    validation = validation_batches(task, job.validation, job.validation_shards)
    engine = DeepSpeedEngine(task, job.train, seed=job.seed, init_weights=job.init_weights)
    checkpoint = ray.train.get_checkpoint()
    with ExitStack() as stack:
        resume, step, trips = None, 0, 0
        if checkpoint is not None:
            resume = Path(stack.enter_context(checkpoint.as_directory()))
            step, trips = parse_checkpoint_name(PurePosixPath(checkpoint.path).name)
        observer = BoardObserver(board, job.name, trips)
        observer.on_start(step)
        run_training(engine, batches, validation, job, observer, resume=resume)


def crop_reader(job: TrainJob, task: Task, *, rank: int, world_size: int, lanes: Lanes | None = None) -> BatchSource:
    """Return the micro-batches of one of a job's workers.

    Args:
        job: what is trained.
        task: makes the examples.
        rank: the worker's number.
        world_size: workers that there are now; with the accumulation they divide the job's batch.
        lanes: of the run that is resumed, from `lanes_of` of its workers' reader states; None where it starts.
    """
    train = job.train
    reader = CropReader(
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
    )
    return cast("BatchSource", reader)


def validation_batches(task: Task, config: ValidationConfig, shards: Sequence[str]) -> list[Batch]:
    """Make the fixed validation crops, dealt out over the images in turn, as batches; the same in every worker."""
    images = read_images(shards)
    examples = []
    for index in range(config.crops):
        _, image, meta = images[index % len(images)]
        examples.append(task.validation_example(image, caption_of(meta), config.crop_px, index))
    chunks = [examples[start : start + config.batch_size] for start in range(0, len(examples), config.batch_size)]
    return [{name: torch.from_numpy(np.stack([example[name] for example in chunk])) for name in chunk[0]} for chunk in chunks]


def checkpoint_name(step: int, trips: int) -> str:
    """Return the name of a checkpoint: its step, and how often the guard had tripped.

    After a rollback a step comes again, and Ray Train must not take its new checkpoint for the old one, which it deletes in time.
    """
    return f"{CHECKPOINT_PREFIX}{step:08d}" + (f"-{trips}" if trips else "")


def parse_checkpoint_name(name: str) -> tuple[int, int]:
    """Return step and trips from what `checkpoint_name` made."""
    step, _, trips = name.removeprefix(CHECKPOINT_PREFIX).partition("-")
    return int(step), int(trips or 0)


class BoardObserver:
    """Tells the board what happens, and hands checkpoints to Ray Train."""

    def __init__(self, board: ProgressBoard, source: str, trips: int) -> None:
        """Speak for one worker of the job `source`, whose guard has tripped `trips` times before."""
        self._board = board
        self._source = source
        self._trips = trips
        self._leads = ray.train.get_context().get_world_rank() == 0

    def on_start(self, step: int) -> None:
        """Say that training begins, at `step` if it resumes."""
        if self._leads:
            self._board.push(self._source, "start", step, {"workers": ray.train.get_context().get_world_size()})

    def on_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Pass on the metrics of the steps since the last call."""
        self._board.push(self._source, "metrics", step, values)

    def on_validation(self, step: int, values: Mapping[str, float], decision: KneeDecision) -> None:
        """Pass on a validation and what the knee detector made of it."""
        self._board.push(self._source, "validation", step, values, decision.to_json())

    def on_trip(self, step: int, trip: Trip) -> None:
        """Pass on a trip of the guard."""
        self._trips += 1
        if self._leads:
            self._board.push(self._source, "trip", step, {}, trip.to_json())

    def on_checkpoint(self, step: int, folder: Path, values: Mapping[str, float]) -> None:
        """Store this worker's share and return when the run would resume from it.

        The upload is synchronous, and worker 0 also waits for Ray Train's controller to take note (half a polling interval; the
        others meet it at the next step). Ray's asynchronous mode would lose more than one checkpoint interval to a worker that
        dies before it is through.
        """
        ray.train.report(
            {"step": step, **values},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=checkpoint_name(step, self._trips),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.SYNC,
            delete_local_checkpoint_after_upload=True,
        )
        if self._leads:
            ray.train.get_all_reported_checkpoints(consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED)
            self._board.push(self._source, "checkpoint", step, {})
