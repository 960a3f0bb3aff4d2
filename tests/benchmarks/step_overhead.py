"""What a step of the platform costs over the same DeepSpeed engine in a bare loop.

Run: `OMP_NUM_THREADS=1 python tests/benchmarks/step_overhead.py`. Both sides train the quickstart's network on the same batches in one
process, a step of one after a step of the other, and are compared by the median CPU time of a step. The platform's step has everything
a bare loop lacks: learning rate, average of weights, collecting and logging metrics. Exits with 1 if it costs over `--limit`.
`--kernels` has the network of the platform's step alone compute by compiled kernels, so that the ratio is what they and the platform make.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import process_time

import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_RANK", "0")

import deepspeed

from linearsr.config import BACKBONES, AugmentationConfig, DegradationConfig, LatentStatistics, ModelConfig
from linearsr.kernels import Kernels
from linearsr.kernels.build import build_kernels
from linearsr.task import SuperResolutionTask
from linearsr.task_config import TaskConfig
from linearsr_platform.recipe.train_schema import TrainConfig, ValidationConfig, ZeroConfig
from linearsr_platform.train.deepspeed_config import deepspeed_config
from linearsr_platform.train.engine import DeepSpeedEngine, StepModule
from linearsr_platform.train.job import TrainJob
from linearsr_platform.train.loop import run_training

Batch = dict[str, torch.Tensor]


class Alternating:
    """Batches for the platform; handing one out runs a bare step first, and the time between two calls is a platform step."""

    def __init__(self, batch: Batch, bare_step) -> None:
        self.batch, self.bare_step = batch, bare_step
        self.bare_s: list[float] = []
        self.platform_s: list[float] = []
        self.handed_out_s: float | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        called_s = process_time()
        if self.handed_out_s is not None:
            self.platform_s.append(called_s - self.handed_out_s)
        start_s = process_time()
        self.bare_step(self.batch)
        self.bare_s.append(process_time() - start_s)
        self.handed_out_s = process_time()
        return self.batch

    def state(self) -> dict[str, object]:
        return {}

    def restore(self, states) -> None:
        pass


class Silent:
    """An observer that drops everything, checkpoints too."""

    def on_metrics(self, step, values) -> None:
        pass

    def on_validation(self, step, values, decision) -> None:
        pass

    def on_start(self, step) -> None:
        pass

    def on_checkpoint(self, step) -> None:
        pass

    def on_message(self, step, text) -> None:
        pass


def quickstart_task(crop_px: int) -> SuperResolutionTask:
    """Return the task of the nano network with the LR prior."""
    model = ModelConfig(prior="lr", backbone=BACKBONES["nano"])
    channels = model.codec.latent_channels
    statistics = LatentStatistics(mean=(0.0,) * channels, std=(1.0,) * channels, residual_std=(0.5,) * channels)
    return SuperResolutionTask(
        TaskConfig(
            model=model,
            statistics=statistics,
            interval=(0.0, 1.0),
            degradation=DegradationConfig(),
            augmentation=AugmentationConfig(),
            crop_px=crop_px,
            validation_steps=1,
            metrics=("psnr_y", "ssim_y", "gmsd"),
        )
    )


def bare_engine(task: SuperResolutionTask, config: TrainConfig):
    """Return DeepSpeed's own engine with the same network, optimizer and configuration."""
    module = StepModule(task, torch.Generator().manual_seed(0))
    numel = sum(parameter.numel() for parameter in module.parameters())
    optimizer = torch.optim.AdamW(module.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)
    return deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config(config, numel), dist_init_required=False)[0]


def measure(stage: int, precision: str, steps: int, batch_size: int, crop_px: int, log_every: int, kernels: Kernels | None) -> Alternating:
    """Train both for `steps` steps and return the timings."""
    never = 10**9
    config = TrainConfig(
        max_steps=steps,
        batch_size=batch_size,
        crop_px=crop_px,
        precision=precision,
        log_every=log_every,
        validate_every=never,
        checkpoint_every=never,
        zero=ZeroConfig(stage=stage),
    )
    task = quickstart_task(crop_px)
    task.kernels = kernels
    engine = DeepSpeedEngine(task, config, seed=0)
    task.kernels = None
    bare = bare_engine(task, config)

    def bare_step(batch: Batch) -> None:
        loss, _ = bare(batch)
        bare.backward(loss)
        bare.step()

    generator = torch.Generator().manual_seed(0)
    sides = {"hr": crop_px, "lr": crop_px // task.config.model.scale}
    batch = {name: torch.randint(0, 256, (batch_size, 3, side, side), generator=generator).byte() for name, side in sides.items()}
    batch["tags"] = torch.zeros(batch_size, task.config.model.tags.max_tags, dtype=torch.int64)
    noise = torch.randn(batch_size, task.config.model.codec.latent_channels, crop_px // 4, crop_px // 4, generator=generator)
    batches = Alternating(batch, bare_step)
    with tempfile.TemporaryDirectory() as folder:
        job = TrainJob(
            name="overhead",
            task="linearsr.task:SuperResolutionTask",
            task_config=task.config,
            train=config,
            validation=ValidationConfig(),
            train_shards=(),
            validation_shards=(),
            output_url=str(Path(folder, "run")),
        )
        run_training(engine, batches, [{**batch, "noise": noise}], job, Silent())
    engine.close()
    bare.destroy()
    return batches


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=2, choices=(0, 1, 2, 3), help="ZeRO stage")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=60, help="steps of each side")
    parser.add_argument("--warmup", type=int, default=5, help="first steps that are not counted")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--crop-px", type=int, default=128)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--kernels", action="store_true", help="compiled kernels on the platform's side")
    parser.add_argument("--limit", type=float, default=1.05, help="largest accepted ratio of medians")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape = (arguments.batch_size, arguments.crop_px)
    kernels = build_kernels() if arguments.kernels else None
    timings = measure(arguments.stage, arguments.precision, arguments.steps, *shape, arguments.log_every, kernels)
    bare_ms, platform_ms = (1e3 * median(side[arguments.warmup :]) for side in (timings.bare_s, timings.platform_s))
    ratio = platform_ms / bare_ms
    print(f"ZeRO {arguments.stage}, {arguments.precision}, batch {arguments.batch_size} of {arguments.crop_px} px")
    print(f"medians: bare {bare_ms:.1f} ms, platform {platform_ms:.1f} ms, ratio {ratio:.3f} (limit {arguments.limit})")
    return int(ratio > arguments.limit)


if __name__ == "__main__":
    sys.exit(main())
