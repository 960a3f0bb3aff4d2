"""The profiling pass over a trained network, on a worker of the cluster."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import ray
import torch
from safetensors.torch import load_file
from torch import Tensor

from linearsr.config import FlowConfig
from linearsr.flow import interval_mass
from linearsr.noise_profile import NoiseProfile
from linearsr.profiling import level_intervals, measure_profile
from linearsr.task import SuperResolutionTask
from linearsr.task_config import TaskConfig
from linearsr_platform import storage
from linearsr_platform.cluster.board import ProgressBoard
from linearsr_platform.cluster.capacity import Share
from linearsr_platform.cluster.device import own_device
from linearsr_platform.cluster.experts import POLL_S
from linearsr_platform.cluster.worker import crop_reader
from linearsr_platform.recipe.search_schema import ProfileSection
from linearsr_platform.train.job import TrainJob


@dataclass(frozen=True, kw_only=True)
class ProfilePlan:
    """What is profiled; picklable."""

    job: TrainJob
    """A training of the network over all noise levels; its weights are `job.init_weights`."""
    task: TaskConfig
    section: ProfileSection
    log_snr: tuple[float, float]
    """Range that is divided into levels; the first and the last also take what lies beyond."""
    threads: int


def profile_on_cluster(plan: ProfilePlan, share: Share, on_level: Callable[[int, int], None]) -> NoiseProfile:
    """Measure a profile on a worker, which may wait for room.

    Args:
        plan: what to measure.
        share: what the worker reserves.
        on_level: called with the number of levels done and of all.
    """
    board = ProgressBoard.start()
    ref = _profile.options(num_cpus=share.cpus, num_gpus=share.gpus, memory=int(share.memory_bytes)).remote(plan, board)
    try:
        done: list[object] = []
        while not done:
            done, _ = ray.wait([ref], timeout=POLL_S)
            for event in board.drain():
                on_level(event.step, plan.section.levels)
        profile: NoiseProfile = ray.get(ref)
    finally:
        ray.cancel(ref)
        board.close()
    return profile


# The process ends with it: kept for other tasks, it would keep the memory of a network and its gradients.
@ray.remote(max_retries=2, max_calls=1)
def _profile(plan: ProfilePlan, board: ProgressBoard) -> NoiseProfile:
    torch.set_num_threads(plan.threads)
    device = own_device()
    low, high = plan.log_snr
    levels, crops = plan.section.levels, plan.section.crops
    edges = tuple(low + (high - low) * index / levels for index in range(levels + 1))
    network = plan.job.build_task().build()
    assert plan.job.init_weights is not None  # noqa: S101 (profiles are of trained networks)
    with storage.local_path(plan.job.init_weights) as path:
        network.load_state_dict(load_file(path))
    network.to(device)
    train = plan.job.train.model_copy(update={"batch_size": crops, "accumulation": 1, "workers": 1})
    batches = crop_reader(replace(plan.job, train=train), SuperResolutionTask(plan.task), rank=0, world_size=1)

    def loss_at(interval: tuple[float, float], generator: torch.Generator) -> Tensor:
        task = SuperResolutionTask(_at(plan.task, interval))
        return task.loss(network, {name: value.to(device) for name, value in next(batches).items()}, generator)[0]

    return measure_profile(
        loss_at,
        list(network.parameters()),
        edges=edges,
        mass=tuple(interval_mass(interval, plan.task.model.flow) for interval in level_intervals(edges)),
        samples=plan.section.samples,
        seed=plan.job.seed,
        source={"weights": storage.name_of(plan.job.init_weights), "crops": f"{crops} of {train.crop_px} px a gradient"},
        on_level=lambda done, total: board.push("profile", "doing", done, {}),
    )


def _at(task: TaskConfig, interval: tuple[float, float]) -> TaskConfig:
    """Return the task on one level. Draws of pure noise, which the recipe adds, all belong to the level that holds t = 1."""
    flow: FlowConfig = task.model.flow
    at_end = flow.endpoint_fraction / interval_mass(interval, flow) if interval[1] == 1 and flow.endpoint_fraction else 0.0
    return replace(task, interval=interval, model=replace(task.model, flow=replace(flow, endpoint_fraction=at_end)))
