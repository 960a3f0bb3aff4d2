"""A task that trains in milliseconds, and jobs made of it. On PYTHONPATH, because Ray's workers import it too."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import ray
import torch
from torch import Tensor, nn
from toy_config import ToyConfig

from linearsr_platform.cluster.session import cluster_session
from linearsr_platform.data.shards import Sample, write_shard
from linearsr_platform.recipe.schema import ClusterConfig
from linearsr_platform.recipe.train_schema import KneeConfig, TrainConfig, ValidationConfig
from linearsr_platform.train.job import TrainJob

CPUS = 2
CLUSTER = ClusterConfig(num_cpus=CPUS, num_gpus=1, cpus_per_worker=1.0, object_store_mb=100)
"""The GPU is one that Ray was told of and torch does not find: only who asks for one notices."""


@contextmanager
def toy_cluster() -> Iterator[ClusterConfig]:
    """Be on a local cluster whose workers can import this file; one that runs already is used."""
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), before]).rstrip(os.pathsep)
    try:
        with cluster_session(CLUSTER):
            yield CLUSTER
    finally:
        os.environ["PYTHONPATH"] = before


def free_cpus(wait_s: float = 60.0) -> float:
    """Return the CPUs that nobody has reserved, once all are free or the time is over."""
    end = time.monotonic() + wait_s
    while (free := ray.available_resources().get("CPU", 0.0)) < CPUS and time.monotonic() < end:
        time.sleep(0.2)
    return free


class ToyTask:
    """Learns to double its input."""

    def __init__(self, config: ToyConfig) -> None:
        self._config = config
        if config.pids is not None:
            Path(config.pids).mkdir(parents=True, exist_ok=True)
            Path(config.pids, str(os.getpid())).touch()

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Conv2d(3, 3, 3, padding=1)

    def transform(self, image, tags, rng):
        top, left = rng.integers(0, 16, size=2)
        return {"hr": image[top : top + 16, left : left + 16].transpose(2, 0, 1).astype(np.float32) / 255}

    def validation_example(self, image, tags, crop_px, index):
        return {"hr": image[:crop_px, :crop_px].transpose(2, 0, 1).astype(np.float32) / 255}

    def loss(self, module: nn.Module, batch: dict[str, Tensor], generator: torch.Generator):
        time.sleep(self._config.pause_s)
        noise = 0.01 * torch.randn(batch["hr"].shape, generator=generator)
        return (module(batch["hr"] + noise) - 2 * batch["hr"]).square().mean(), {}

    def validate(self, module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        error = (module(batch["hr"]) - 2 * batch["hr"]).square().mean(dim=(1, 2, 3))
        return {"psnr_y": -10 * error.log10()}


class PoisonedToyTask(ToyTask):
    """The same with one loss that is not a number, at the 27th call in each worker."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self._calls = 0

    def loss(self, module: nn.Module, batch: dict[str, Tensor], generator: torch.Generator):
        self._calls += 1
        loss, logged = super().loss(module, batch, generator)
        return loss * (float("nan") if self._calls == 27 else 1.0), logged


class QuietToyTask(ToyTask):
    """The same without noise of its own: what it learns depends on the batches alone."""

    def loss(self, module: nn.Module, batch: dict[str, Tensor], generator: torch.Generator):
        time.sleep(self._config.pause_s)
        return (module(batch["hr"]) - 2 * batch["hr"]).square().mean(), {}


class MeetingToyTask(ToyTask):
    """The same, but no step is done before another job's task has been made; it is waited for a minute at most."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self._until_s = time.monotonic() + 60

    def loss(self, module: nn.Module, batch: dict[str, Tensor], generator: torch.Generator):
        while len(list(Path(self._config.pids).parent.iterdir())) < 2 and time.monotonic() < self._until_s:
            time.sleep(0.2)
        return super().loss(module, batch, generator)


class ForgetfulToyTask(ToyTask):
    """The same with a loss that grows with every call in this process, which no checkpoint knows of."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self._calls = 0

    def loss(self, module: nn.Module, batch: dict[str, Tensor], generator: torch.Generator):
        self._calls += 1
        loss, logged = super().loss(module, batch, generator)
        return loss * (1 + 0.01 * self._calls), logged


class WatchedToyTask(ToyTask):
    """The same, and the processes that make its examples say who they are too."""

    def transform(self, image, tags, rng):
        Path(self._config.pids, str(os.getpid())).touch()
        return super().transform(image, tags, rng)


def write_images(folder: Path) -> tuple[str, ...]:
    """Write two shards of two images."""
    rng = np.random.default_rng(0)
    for shard in range(2):
        images = [rng.integers(0, 256, size=(32, 32, 3), dtype=np.uint8) for _ in range(2)]
        write_shard(str(folder), f"{shard}.tar", [Sample(f"{shard}-{i}", image, {"tags": []}) for i, image in enumerate(images)])
    return tuple(str(folder / f"{shard}.tar") for shard in range(2))


def toy_job(
    folder: Path, name: str, *, pause_s: float = 0.0, task: str = "ToyTask", init_weights: str | None = None, pids: bool = False, **train
) -> TrainJob:
    """Make a job with its data and output below `folder`."""
    settings = {"max_steps": 20, "batch_size": 4, "crop_px": 16, "log_every": 5, "validate_every": 10, "checkpoint_every": 5}
    knee = KneeConfig(metrics=("psnr_y",), stop=False)
    shards = write_images(folder / "data")
    return TrainJob(
        name=name,
        task=f"toy_training:{task}",
        task_config=ToyConfig(pause_s, str(folder / "pids" / name) if pids else None),
        train=TrainConfig(**{**settings, "lr": 1e-2, "knee": knee, **train}),
        validation=ValidationConfig(crops=4, crop_px=16, batch_size=2, metrics=("psnr_y",)),
        train_shards=shards,
        validation_shards=shards,
        output_url=str(folder / "out" / name),
        init_weights=init_weights,
    )
