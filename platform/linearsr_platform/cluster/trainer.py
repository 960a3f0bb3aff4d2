"""One job as one Ray Train run: started, restarted after failures, resumed, and its outcome read back."""

import threading
from collections.abc import Callable
from typing import Any

import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray._raylet import RAY_NODE_ID_KEY  # type: ignore[attr-defined]
from ray.exceptions import RayError
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2.api.callback import RayTrainCallback

# What `ray.train` exports at run time; type checkers see the former version there.
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.api.result import Result

from linearsr_platform import storage
from linearsr_platform.cluster.board import ProgressBoard
from linearsr_platform.cluster.capacity import Share, no_room, share_of_worker, still_waiting
from linearsr_platform.cluster.controller import TrainController
from linearsr_platform.cluster.experts import room_now
from linearsr_platform.cluster.failures import StopAtFinalError, TrainerFailed, explain
from linearsr_platform.cluster.patience import Patience
from linearsr_platform.cluster.process_group import LateTorch
from linearsr_platform.cluster.record import checkpoints_url, finished_outcome, run_name
from linearsr_platform.cluster.scaling import scaling_policy
from linearsr_platform.recipe.schema import ClusterConfig
from linearsr_platform.train.job import TrainJob
from linearsr_platform.train.outcome import TrainOutcome


def fit(
    job: TrainJob,
    cluster: ClusterConfig,
    *,
    storage_url: str,
    board: ProgressBoard,
    share: Share | None = None,
    keep_checkpoints: bool = False,
) -> TrainOutcome:
    """Train a job on the cluster and return its outcome; a finished job returns it at once, an interrupted one resumes.

    Blocks, and takes over Ctrl-C while it does; `experts.fit_all` runs it in a Ray task instead. The job's folder has been claimed, in
    a process that reads what comes of it.

    Args:
        job: what to do.
        cluster: how long to wait for room.
        storage_url: folder for the checkpoints of jobs.
        board: told about progress.
        share: what each worker reserves; None takes what `cluster` says.
        keep_checkpoints: whether they stay when the job is finished.

    Raises:
        TrainerFailed: if it fails for good.
        UserError: if the failure is a mistake of the user.
    """
    url = storage.join(storage_url, run_name(job))
    outcome = finished_outcome(job)
    if outcome is None:
        trainer = _trainer(job, cluster, storage.absolute(storage_url), board, share or share_of_worker(cluster))
        try:
            trainer.fit()
        except (TrainingFailedError, RayError) as error:
            raise explain(job.name, error) from None
        outcome = finished_outcome(job)
    if outcome is None:
        raise TrainerFailed(f"{job.name}: ended, but there is no outcome in {job.output_url}")
    if not keep_checkpoints:
        storage.remove(url)
    return outcome


class _LeanTrainer(DataParallelTrainer):
    """A `TorchTrainer` without two of its processes, of about 2 CPU seconds and 125 MB each, with torch in its workers alone.

    Ray Data's manager: batches do not come from Ray Data. The cleaner of reservations: `reservations` knows of more, and needs no process.
    Its controller is that of `controller`, and its scaling policy that of `scaling`.
    """

    def __init__(self, train: Callable[[dict[str, Any]], None], *, patience: Patience, **ray_train: Any) -> None:
        """Keep how long it waits for room; the rest is Ray's."""
        super().__init__(train, **ray_train)
        self._patience = patience

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        callbacks: list[RayTrainCallback] = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, (DatasetsCallback, PlacementGroupCleanerCallback))]

    def _initialize_and_run_controller(self, **controller_init_kwargs: Any) -> Result:
        """Do what Ray does here, whose own controller is not to be chosen."""
        make: Any = ray.remote(
            num_cpus=0,
            # On the machine of the process that waits for it.
            label_selector={RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()},
            runtime_env={"env_vars": {RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: "0", **get_env_vars_to_propagate()}},
        )(TrainController)
        controller_init_kwargs["scaling_policy"] = scaling_policy(self.scaling_config)  # type: ignore[arg-type]
        controller = make.remote(patience=self._patience, **controller_init_kwargs)
        if threading.current_thread() is threading.main_thread():
            self._register_sigint_handler(controller)
        ray.get(controller.run.remote())
        result: Result = ray.get(controller.get_result.remote())
        return result


def _work(config: dict[str, Any]) -> None:
    """Train as a worker; the process that starts the trainer pickles this, and needs nothing that the worker does."""
    from linearsr_platform.cluster.worker import train_worker

    train_worker(config)


def _trainer(job: TrainJob, cluster: ClusterConfig, storage_url: str, board: ProgressBoard, share: Share) -> DataParallelTrainer:
    threads, least = max(1, int(share.cpus)), job.train.min_workers
    limit_s, workers = cluster.queue_timeout_s, job.train.least_workers

    def tell(waited_s: float) -> None:
        text = still_waiting(workers, share, room_now(), waited_s=waited_s, limit_s=limit_s)
        board.push(job.name, "message", 0, {}, {"text": text})

    return _LeanTrainer(
        _work,
        patience=Patience(limit_s, no_room(workers, share, limit_s), tell=tell),
        # The job by reference: Ray Train's own processes then need not import what is in it.
        train_loop_config={"job": ray.put(job), "board": board, "threads": threads, "checkpoints": checkpoints_url(storage_url, job)},
        backend_config=LateTorch("nccl" if share.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=job.train.workers if least is None else (least, job.train.workers),
            use_gpu=share.gpus > 0,
            resources_per_worker=share.resources,
        ),
        run_config=RunConfig(
            name=run_name(job),
            storage_path=storage_url,
            failure_config=FailureConfig(max_failures=job.train.max_failures),
            callbacks=[StopAtFinalError()],
            # OpenCV, which degrades crops, otherwise takes all cores of the machine, for operations of a millisecond.
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads), "OPENCV_FOR_THREADS_NUM": str(threads)}},
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
