"""What the guard makes of injected faults and of clean runs, on the quickstart's network and photographs.

Run: `OMP_NUM_THREADS=1 python tests/benchmarks/guard_faults.py [--seed N] [--clean RUNS]`. Every fault is run next to the undisturbed
run of the same seed and compared by the flow-matching loss on the validation crops, over the same noise levels and noise every time.
Faults come from outside, by wrapping the task, the engine and the reader. Exits with 1 if a run with a fault ends over `--limit` away
from the undisturbed one, if one does not trip, if a lasting fault does not end training, or if a clean run trips.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_RANK", "0")

import deepspeed  # noqa: F401  first, because it patches torch

from linearsr.config import AugmentationConfig, BackboneConfig, DegradationConfig, FlowConfig, LatentStatistics, ModelConfig
from linearsr.degradation import augment, degrade
from linearsr.guard import GuardConfig, Trip
from linearsr.statistics import measure_statistics
from linearsr.task import SuperResolutionTask, to_pixels
from linearsr.task_config import TaskConfig
from linearsr_platform.data.prepare import prepare
from linearsr_platform.data.reader import CropReader, read_images
from linearsr_platform.data.shards import Sample, write_shard
from linearsr_platform.recipe.data_schema import DataConfig, SourceConfig
from linearsr_platform.recipe.train_schema import KneeConfig, TrainConfig, ValidationConfig, ZeroConfig
from linearsr_platform.train.engine import DeepSpeedEngine
from linearsr_platform.train.job import TrainJob
from linearsr_platform.train.loop import run_training
from linearsr_platform.train.recovery import TrainingDiverged

ROOT = Path(__file__).parents[2]
TILES = 16
"""Pieces that a photograph is cut into for the poisoned shard: one block of the reader, which then comes at a stretch."""
VALIDATION_DRAWS = 8


class MeasuredTask(SuperResolutionTask):
    """The task itself, whose validation also measures the training loss over fixed noise levels and noise."""

    def validate(self, module, batch):
        values = super().validate(module, batch)
        generator = torch.Generator().manual_seed(17)
        losses = [self._plain_loss(module, batch, generator) for _ in range(VALIDATION_DRAWS)]
        return {**values, "loss": torch.stack(losses).mean().expand(batch["hr"].shape[0])}

    def _plain_loss(self, module, batch, generator):
        return SuperResolutionTask.loss(self, module, batch, generator)[0]


@dataclass
class Photographs:
    """Shards, validation shards and latent statistics of the quickstart's photographs."""

    shards: tuple[str, ...]
    validation: tuple[str, ...]
    statistics: LatentStatistics

    @classmethod
    def prepared(cls, folder: Path) -> "Photographs":
        sources = {
            "skimage": SourceConfig(url="package://skimage/data", table="quickstart/photos.csv"),
            "sklearn": SourceConfig(url="package://sklearn/datasets/images", table="quickstart/photos.csv"),
        }
        data = DataConfig(sources=sources, validation_px=128)
        manifest = prepare(data, recipe_folder=str(ROOT / "pipelines"), output_url=str(folder), min_shards=2)
        shards = manifest.shard_urls(str(folder), "train")
        images = [image for _, image, _ in read_images(shards)]
        rng = np.random.default_rng(5)
        crops = [augment(images[i % len(images)], 64, AugmentationConfig(), rng) for i in range(96)]
        degraded = [degrade(crop, 4, DegradationConfig(), rng) for crop in crops]
        hr, lr = (to_pixels(torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2)) for part in (crops, degraded))
        return cls(shards, manifest.shard_urls(str(folder), "validation"), measure_statistics(model(), hr, lr))

    def tiled(self, folder: Path) -> tuple[str, ...]:
        """Cut every photograph, upright and turned, into pieces, one shard each; a shard is then one block of the reader."""
        urls = []
        images = [image for _, image, _ in read_images(self.shards)]
        for number, image in enumerate([*images, *(np.rot90(image) for image in images)]):
            pieces = [piece for row in np.array_split(image, 4) for piece in np.array_split(row, TILES // 4, axis=1)]
            samples = [Sample(f"{number}-{i}", np.ascontiguousarray(piece), {"tags": []}) for i, piece in enumerate(pieces)]
            write_shard(str(folder), f"{number:05d}.tar", samples)
            urls.append(str(folder / f"{number:05d}.tar"))
        return tuple(urls)


def model() -> ModelConfig:
    """Return the quickstart's network."""
    backbone = BackboneConfig(width=64, num_blocks=2, ffn_ratio=2.0, caption_width=32, num_cross_heads=4)
    return ModelConfig(prior="lr", backbone=backbone, flow=FlowConfig(endpoint_fraction=0.1, loss_weighting="pixel"))


@dataclass
class Recorder:
    """Drops checkpoints and keeps the rest."""

    trips: list[Trip] = field(default_factory=list)
    losses: list[tuple[int, float, float]] = field(default_factory=list)

    def on_metrics(self, step, values) -> None:
        self.losses.append((step, values["loss"], values["grad_norm"]))

    def on_validation(self, step, values, decision) -> None:
        pass

    def on_trip(self, step, trip) -> None:
        self.trips.append(trip)

    def on_start(self, step) -> None:
        pass

    def on_checkpoint(self, step) -> None:
        pass

    def on_message(self, step, text) -> None:
        pass


@dataclass(frozen=True)
class Setting:
    """One run."""

    seed: int = 0
    steps: int = 400
    batch_size: int = 8
    crop_px: int = 64
    lr: float = 2e-3
    interval: tuple[float, float] = (0.0, 1.0)
    prior: str = "lr"
    stage: int = 2
    precision: str = "float32"
    schedule: str = "constant"
    accumulation: int = 1
    guard: GuardConfig = field(default_factory=GuardConfig)

    def train(self) -> TrainConfig:
        never = KneeConfig(metrics=("psnr_y",), stop=False)
        return TrainConfig(
            max_steps=self.steps, batch_size=self.batch_size, crop_px=self.crop_px, lr=self.lr, warmup_steps=20, clip_norm=1.0,
            ema_decay=0.99, validate_every=50, checkpoint_every=50, zero=ZeroConfig(stage=self.stage), precision=self.precision,
            schedule=self.schedule, accumulation=self.accumulation, knee=never, guard=self.guard,
        )  # fmt: skip


Wrap = Callable[[object], object]


@dataclass
class Fault:
    """What is wrapped around which part."""

    task: Wrap = lambda task: task
    engine: Wrap = lambda engine: engine
    shards: Callable[[tuple[str, ...], int], tuple[str, ...]] | None = None


class Scaled:
    """Multiplies the training loss, or the gradient of one parameter, at some calls."""

    def __init__(self, task, calls: range, *, loss: float = 1.0, gradient: str = "", factor: float = 1.0) -> None:
        self._task, self._calls, self._loss, self._gradient, self._factor = task, calls, loss, gradient, factor
        self._count = 0

    def __getattr__(self, name):
        return getattr(self._task, name)

    def loss(self, module, batch, generator):
        self._count += 1
        if self._count not in self._calls:
            return self._task.loss(module, batch, generator)
        handles = []
        if self._gradient:
            parameter = dict(module.named_parameters())[self._gradient]
            handles.append(parameter.register_hook(lambda gradient: [handle.remove() for handle in handles] and gradient * self._factor))
        loss, logged = self._task.loss(module, batch, generator)
        return loss * self._loss, logged


class Hurried:
    """Multiplies the learning rate of some steps, counted over the whole run."""

    def __init__(self, engine, calls: range, factor: float) -> None:
        self._engine, self._calls, self._factor, self._count = engine, calls, factor, 0

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def train_step(self, batches, lr, **options):
        self._count += 1
        return self._engine.train_step(batches, lr * (self._factor if self._count in self._calls else 1.0), **options)


def drawn_anew(engine):
    """Draw other noise: what no fault at all changes."""
    engine.generator.manual_seed(4711)
    return engine


def poisoned(shards: tuple[str, ...], index: int, folder: Path) -> tuple[str, ...]:
    """Replace the photographs of one shard by noise."""
    rng = np.random.default_rng(3)
    samples = [
        Sample(key, rng.integers(0, 256, image.shape, dtype=np.uint8), {"tags": []}) for key, image, _ in read_images([shards[index]])
    ]
    write_shard(str(folder), "poisoned.tar", samples)
    return tuple(str(folder / "poisoned.tar") if i == index else shard for i, shard in enumerate(shards))


def run(photographs: Photographs, setting: Setting, fault: Fault | None = None, shards: tuple[str, ...] | None = None):
    """Train once; returns outcome (None if training ended with an error), trips, the error and the metrics."""
    fault = fault or Fault()
    train = setting.train()
    config = TaskConfig(
        model=ModelConfig(prior=setting.prior, backbone=model().backbone, flow=model().flow),
        statistics=photographs.statistics, interval=setting.interval, degradation=DegradationConfig(), augmentation=AugmentationConfig(),
        crop_px=setting.crop_px, validation_steps=1, metrics=("psnr_y",), seed=setting.seed,
    )  # fmt: skip
    task = fault.task(MeasuredTask(config))
    shards = shards or photographs.shards
    reader = CropReader(shards, task.transform, batch_size=train.micro_batch_size, crops_per_image=8, seed=setting.seed)
    images = read_images(photographs.validation)
    examples = [task.validation_example(images[i % len(images)][1], [], 128, i) for i in range(8)]
    validation = [{name: torch.from_numpy(np.stack([example[name] for example in examples])) for name in examples[0]}]
    recorder, outcome, error = Recorder(), None, None
    with tempfile.TemporaryDirectory() as folder:
        job = TrainJob(
            name="guarded", task="unused:Unused", task_config=None, train=train, validation=ValidationConfig(), train_shards=(),
            validation_shards=(), output_url=folder, seed=setting.seed,
        )  # fmt: skip
        engine = DeepSpeedEngine(task, train, seed=setting.seed)
        try:
            outcome = run_training(fault.engine(engine), reader, validation, job, recorder)
        except TrainingDiverged as caught:
            error = str(caught)
        engine.close()
    return outcome, recorder, error


LAYER = "network.blocks.1.attention.qkv.weight"


def faults(photographs: Photographs, setting: Setting, limit: float, folder: Path, chosen: set[str]) -> bool:
    """Print one line a fault; returns whether all is as it should be."""
    once, late = range(170, 171), range(170, 10**9)
    tiled = photographs.tiled(folder / "tiled")
    transient: dict[str, tuple[Fault, tuple[str, ...]]] = {
        "nan gradient": (Fault(task=lambda task: Scaled(task, once, gradient=LAYER, factor=float("nan"))), photographs.shards),
        "loss x100": (Fault(task=lambda task: Scaled(task, once, loss=100.0)), photographs.shards),
        "loss x100, 5 steps": (Fault(task=lambda task: Scaled(task, range(170, 175), loss=100.0)), photographs.shards),
        "lr x1000, 20 steps": (Fault(engine=lambda engine: Hurried(engine, range(170, 190), 1000.0)), photographs.shards),
        "none, other noise": (Fault(engine=drawn_anew), photographs.shards),
        "poisoned shard": (Fault(shards=lambda shards, index: poisoned(shards, index, folder)), tiled),
    }
    undisturbed: dict[tuple[str, ...], float] = {}
    good = True
    for name, (fault, shards) in transient.items():
        if chosen and name not in chosen:
            continue
        if shards not in undisturbed:
            undisturbed[shards] = run(photographs, setting, shards=shards)[0].history[-1]["loss"]
        used = shards if fault.shards is None else fault.shards(shards, last_shard(len(shards), setting.seed))
        outcome, recorder, error = run(photographs, setting, fault, used)
        ended = float("nan") if outcome is None else outcome.history[-1]["loss"]
        change = ended / undisturbed[shards] - 1
        fine = abs(change) <= limit and bool(recorder.trips) == (fault.engine is not drawn_anew)
        good &= fine
        print(
            f"{name:20} validation loss {undisturbed[shards]:.4f} -> {ended:.4f} ({change:+.2%})  {'ok' if fine else 'BAD'}  {error or ''}",
            flush=True,
        )
        for trip in recorder.trips:
            print(f"    {trip.describe()}")
    for name, gradient, factor in (("lasting nan", LAYER, float("nan")), ("lasting x1000", LAYER, 1000.0)):
        if chosen and name not in chosen:
            continue
        lasting = Fault(task=lambda task, g=gradient, f=factor: Scaled(task, late, gradient=g, factor=f))
        _, recorder, error = run(photographs, setting, lasting)
        fine = error is not None and len(recorder.trips) == setting.guard.max_rollbacks + 1 and recorder.trips[0].layer == gradient
        good &= fine
        print(f"{name:20} stopped after {len(recorder.trips) - 1} rollbacks  {'ok' if fine else 'BAD'}\n    {error}")
    return good


def last_shard(count: int, seed: int) -> int:
    """Return the shard that the reader comes to last in its first epoch, so that training is under way by then."""
    return int(np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0]))).permutation(count)[-1])


def clean(photographs: Photographs, runs: int) -> bool:
    """Print one line a clean run; returns whether none tripped."""
    variations: list[dict[str, object]] = [
        {}, {"batch_size": 2}, {"prior": "none"}, {"interval": (0.9, 1.0)}, {"interval": (0.0, 0.25)}, {"lr": 5e-3},
        {"precision": "bfloat16"}, {"schedule": "cosine"}, {"batch_size": 1, "crop_px": 32}, {"accumulation": 2, "stage": 0},
    ]  # fmt: skip
    tripped = 0
    for seed in range(runs):
        variation = variations[seed % len(variations)]
        outcome, recorder, error = run(photographs, Setting(seed=seed, steps=150, **variation))
        tripped += bool(recorder.trips or error)
        ended = float("nan") if outcome is None else outcome.history[-1]["loss"]
        told = "; ".join(trip.describe() for trip in recorder.trips)
        print(f"clean {seed:3}  {variation!s:45} validation loss {ended:.4f}  trips {len(recorder.trips)} {told}", flush=True)
    print(f"{tripped} of {runs} clean runs tripped")
    return tripped == 0


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", type=int, default=20, help="clean runs of 150 steps; 0 for none")
    parser.add_argument("--no-faults", action="store_true", help="clean runs only")
    parser.add_argument("--only", nargs="*", default=[], help="names of faults")
    parser.add_argument("--seed", type=int, default=0, help="of the runs with a fault")
    parser.add_argument("--steps", type=int, default=600, help="of a run with a fault")
    parser.add_argument("--limit", type=float, default=0.02, help="largest accepted relative change of the validation loss")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        photographs = Photographs.prepared(Path(folder, "photographs"))
        good = arguments.no_faults or faults(
            photographs,
            Setting(seed=arguments.seed, steps=arguments.steps, schedule="cosine"),
            arguments.limit,
            Path(folder),
            set(arguments.only),
        )
        good &= clean(photographs, arguments.clean)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
