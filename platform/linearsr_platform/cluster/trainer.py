"""One job as one Ray Train run: started, restarted after failures, resumed, and its outcome read back."""

from math import ceil
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.callback import RayTrainCallback

# What `ray.train` exports at run time; type checkers see the former version there.
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from linearsr_platform import storage
from linearsr_platform.cluster.board import ProgressBoard
from linearsr_platform.cluster.failures import StopAtFinalError, TrainerFailed, explain
from linearsr_platform.cluster.process_group import LateTorch
from linearsr_platform.cluster.record import checkpoints_url, claim_folder, finished_outcome, run_name
from linearsr_platform.cluster.session import QUEUE_POLL_S
from linearsr_platform.recipe.schema import ClusterConfig
from linearsr_platform.train.job import TrainJob
from linearsr_platform.train.outcome import TrainOutcome


def fit(
    job: TrainJob,
    cluster: ClusterConfig,
    *,
    storage_url: str,
    board: ProgressBoard,
    cpus_per_worker: float | None = None,
    keep_checkpoints: bool = False,
) -> TrainOutcome:
    """Train a job on the cluster and return its outcome; a finished job returns it at once, an interrupted one resumes.

    Blocks, and takes over Ctrl-C while it does; `experts.fit_all` runs it in a Ray task instead.

    Args:
        job: what to do.
        cluster: how much each worker gets.
        storage_url: folder for the checkpoints of jobs.
        board: told about progress.
        cpus_per_worker: instead of `cluster.cpus_per_worker`.
        keep_checkpoints: whether they stay when the job is finished.

    Raises:
        TrainerFailed: if it fails for good.
        UserError: if the failure is a mistake of the user.
    """
    url = storage.join(storage_url, run_name(job))
    outcome = finished_outcome(job)
    if outcome is None:
        claim_folder(job)
        cpus = cpus_per_worker or cluster.cpus_per_worker
        trainer = _trainer(job, cluster, storage.absolute(storage_url), board, cpus)
        waited = (
            f"found no room for {job.train.least_workers} workers of {cpus:g} CPUs and {cluster.gpus_per_worker:g} GPUs in "
            f"{cluster.queue_timeout_s:g} s; fix: wait for other work to end, or raise cluster.queue_timeout_s"
        )
        try:
            trainer.fit()
        except (TrainingFailedError, RayError) as error:
            raise explain(job.name, error, waited=waited) from None
        outcome = finished_outcome(job)
    if outcome is None:
        raise TrainerFailed(f"{job.name}: ended, but there is no outcome in {job.output_url}")
    if not keep_checkpoints:
        storage.remove(url)
    return outcome


class _LeanTrainer(DataParallelTrainer):
    """A `TorchTrainer` without two of its processes, of about 2 CPU seconds and 125 MB each, and with torch in its workers alone.

    Ray Data's manager: batches do not come from Ray Data. The cleaner of reservations: `reservations` knows of more, and needs no process.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        callbacks: list[RayTrainCallback] = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, (DatasetsCallback, PlacementGroupCleanerCallback))]


def _work(config: dict[str, Any]) -> None:
    """Train as a worker; the process that starts the trainer pickles this, and needs nothing that the worker does."""
    from linearsr_platform.cluster.worker import train_worker

    train_worker(config)


def _trainer(job: TrainJob, cluster: ClusterConfig, storage_url: str, board: ProgressBoard, cpus: float) -> DataParallelTrainer:
    gpus = cluster.gpus_per_worker
    threads, least = max(1, int(cpus)), job.train.min_workers
    return _LeanTrainer(
        _work,
        # The job by reference: Ray Train's own processes then need not import what is in it.
        train_loop_config={"job": ray.put(job), "board": board, "threads": threads, "checkpoints": checkpoints_url(storage_url, job)},
        backend_config=LateTorch("nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=job.train.workers if least is None else (least, job.train.workers),
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=RunConfig(  # type: ignore[arg-type] # (type checkers see the former version where the trainer names it)
            name=run_name(job),
            storage_path=storage_url,
            failure_config=FailureConfig(
                max_failures=job.train.max_failures,
                controller_failure_limit=ceil(cluster.queue_timeout_s / min(QUEUE_POLL_S, cluster.queue_timeout_s)) - 1,
            ),
            callbacks=[StopAtFinalError()],
            # OpenCV, which degrades crops, otherwise takes all cores of the machine, for operations of a millisecond.
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads), "OPENCV_FOR_THREADS_NUM": str(threads)}},
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
