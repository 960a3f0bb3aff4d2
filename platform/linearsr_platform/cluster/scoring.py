"""The score of several experts together: they restore held-back crops as a release would, and each crop is measured."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import ray
import torch
from safetensors.torch import load_file
from torch import Tensor

from linearsr.config import SamplerConfig
from linearsr.kernels import Kernels, use_kernels
from linearsr.metrics import Meter
from linearsr.model import SuperResolver
from linearsr.routed import RoutedSampler
from linearsr.schedule import times_for_all
from linearsr.task import SuperResolutionTask, to_pixels
from linearsr.task_config import TaskConfig
from linearsr_platform import storage
from linearsr_platform.cluster.capacity import Share
from linearsr_platform.cluster.device import own_device
from linearsr_platform.cluster.worker import validation_batches
from linearsr_platform.recipe.search_schema import ScoreSection
from linearsr_platform.recipe.train_schema import ValidationConfig
from linearsr_platform.train.kernels import kernels_here

PROTOCOL = "quickstart"
"""Metric protocol of scores, that of validation during training."""
VERSION = 2
"""Of how a score is made; trials with scores of another one are not continued."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What is the same for all trials of a search; picklable."""

    task: TaskConfig
    sampler: SamplerConfig
    """Of `section.steps` steps on its grid; where that leaves an expert out, it gets a step of its own."""
    section: ScoreSection
    shards: tuple[str, ...]
    """With the held-back crops."""
    compiled_kernels: bool = False
    """Whether networks and metrics compute with kernels that the machine compiles."""

    def measure(self, weights: Sequence[str], boundaries: Sequence[float]) -> dict[str, list[float]]:
        """Return every metric of every crop.

        Args:
            weights: URLs of the experts' weights, noisiest first.
            boundaries: ascending noise levels between them.
        """
        config = self.section
        crops = ValidationConfig(crops=config.crops, crop_px=config.crop_px, batch_size=config.batch_size)
        device, kernels = own_device(), kernels_here(wanted=self.compiled_kernels)
        times = times_for_all(self.sampler, self.task.model.flow.shift, boundaries)
        sampler = replace(self.sampler, num_steps=len(times), times=times, grid="uniform")
        routed = RoutedSampler([self._expert(url, device, kernels) for url in weights], boundaries, sampler)
        meter = Meter(self.task.metrics, PROTOCOL, self.task.metric_weights, kernels)
        values: dict[str, list[float]] = {name: [] for name in self.task.metrics}
        task = SuperResolutionTask(self.task)
        for batch in validation_batches(task, crops, self.shards):
            moved = {name: value.to(device) for name, value in batch.items()}
            for name, measured in meter.measure(self._restore(routed, task, moved), moved["hr"].float() / 255).items():
                values[name] += measured.double().tolist()
        return values

    @torch.inference_mode()
    def _restore(self, routed: RoutedSampler, task: SuperResolutionTask, batch: dict[str, Tensor]) -> Tensor:
        captions, null = task.captions.at_inference(batch), task.captions.null(len(batch["lr"]), batch["lr"].device)
        clean = routed.sample(batch["noise"], to_pixels(batch["lr"]), captions, null=null)
        return routed.experts[0].space.decode(clean) / 2 + 0.5

    def _expert(self, url: str, device: torch.device, kernels: Kernels | None) -> SuperResolver:
        expert = SuperResolver(self.task.model, self.task.statistics)
        use_kernels(expert, kernels)
        with ExitStack() as stack:
            expert.load_state_dict(load_file(stack.enter_context(storage.local_path(url))))
        return expert.to(device).eval()


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Experts to score."""

    boundaries: tuple[float, ...]
    weights: tuple[str, ...]


def measure_all(scoring: Scoring, candidates: Sequence[Candidate], share: Share) -> list[dict[str, list[float]]]:
    """Score candidates on the cluster, as many at once as there is room for, each with a worker's share; in their order."""
    task = _measure.options(num_cpus=share.cpus, num_gpus=share.gpus, memory=int(share.memory_bytes))
    shared = ray.put(scoring)
    results: list[dict[str, list[float]]] = ray.get([task.remote(shared, one, max(1, int(share.cpus))) for one in candidates])
    return results


@ray.remote(max_retries=2)
def _measure(scoring: Scoring, candidate: Candidate, threads: int) -> dict[str, list[float]]:
    torch.set_num_threads(threads)
    return scoring.measure(candidate.weights, candidate.boundaries)
