"""A small regression, trained by the real loop with the real engine."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from linearsr.guard import Trip
from linearsr_platform import storage
from linearsr_platform.recipe.train_schema import KneeConfig, TrainConfig, ValidationConfig, ZeroConfig
from linearsr_platform.train.engine import DeepSpeedEngine
from linearsr_platform.train.job import TrainJob
from linearsr_platform.train.loop import run_training
from linearsr_platform.train.outcome import TrainOutcome

TRUTH = torch.tensor([[1.0, -2.0, 0.5]])
HELD_BACK = torch.randn(4, 3, generator=torch.Generator().manual_seed(99))


class ToyTask:
    """A small regression with noise from the generator; validation counts as PSNR, or follows a planted curve."""

    def __init__(self, curve: tuple[float, ...] = ()) -> None:
        self.curve = iter(curve) if curve else None

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))

    def loss(self, module: nn.Module, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        noise = torch.randn(batch["x"].shape, generator=generator)
        error = self._predict(module, batch["x"] + 0.05 * noise) - batch["y"]
        return error.square().mean(), {"worst": error.detach().abs().max()}

    def validate(self, module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        error = (self._predict(module, batch["x"]) - batch["y"]).square().mean(1)
        planted = error if self.curve is None else torch.full_like(error, next(self.curve))
        return {"psnr_y": -planted if self.curve is None else planted, "gmsd": error}

    def _predict(self, module: nn.Module, x: Tensor) -> Tensor:
        return module(x.to(module[0].weight.dtype)).float()


class ToyBatches:
    """Batches that depend on their number alone, so that the number is the whole state."""

    def __init__(self, size: int, poison: int | None = None) -> None:
        self.size, self.poison, self.number = size, poison, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        x = torch.randn(self.size, 3, generator=torch.Generator().manual_seed(self.number))
        self.number += 1
        y = x @ TRUTH.T
        return {"x": x, "y": y * float("nan") if self.number == self.poison else y}

    def state(self) -> dict[str, object]:
        return {"number": self.number}

    def restore(self, states) -> None:
        self.number = states[0]["number"]


@dataclass
class Recorder:
    """Keeps everything the loop reports; `folder` is where the checkpoints are."""

    folder: Path
    starts: list[int] = field(default_factory=list)
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    validations: list[int] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    trips: list[Trip] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def on_start(self, step) -> None:
        self.starts.append(step)

    def on_metrics(self, step, values) -> None:
        self.metrics[step] = dict(values)

    def on_validation(self, step, values, decision) -> None:
        self.validations.append(step)

    def on_trip(self, step, trip) -> None:
        self.trips.append(trip)

    def on_checkpoint(self, step) -> None:
        self.checkpoints.append(step)

    def on_message(self, step, text) -> None:
        self.messages.append(text)


def config(*, stage: int = 2, knee: KneeConfig | None = None, **settings) -> TrainConfig:
    """Return a short training, of ZeRO stage 2 if nothing else is said."""
    defaults = {"max_steps": 12, "batch_size": 8, "lr": 0.02, "clip_norm": 1.0, "ema_decay": 0.9, "log_every": 2}
    every = {"validate_every": 4, "checkpoint_every": 5, "keep_checkpoints": 100}
    knee = knee or KneeConfig(metrics=("psnr_y", "gmsd"))
    return TrainConfig(**{**defaults, **every, "zero": ZeroConfig(stage=stage), "knee": knee, **settings})


def train_toy(
    folder: Path, train: TrainConfig, name: str, *, task=None, resume=None, init=None, poison=None, batches=None, clock=None
) -> tuple[TrainOutcome, Recorder]:
    """Run the loop on a fresh engine; returns the outcome and what was reported."""
    recorder = Recorder(folder / name / "checkpoints")
    if resume is not None and resume.parent != recorder.folder:
        shutil.copytree(resume, recorder.folder / resume.name)
    job = TrainJob(
        name=name,
        task="unused:Unused",
        task_config=None,
        train=train,
        validation=ValidationConfig(),
        train_shards=(),
        validation_shards=(),
        output_url=str(folder / name),
    )
    engine = DeepSpeedEngine(task or ToyTask(), train, seed=1, init_weights=init)
    validation = [{"x": HELD_BACK, "y": HELD_BACK @ TRUTH.T}]
    batches = batches or ToyBatches(train.micro_batch_size, poison)
    timing = {} if clock is None else {"clock": clock}
    try:
        return run_training(engine, batches, validation, job, recorder, checkpoints=str(recorder.folder), **timing), recorder
    finally:
        engine.close()


def written(folder: Path) -> TrainOutcome:
    """Return the outcome that the loop left."""
    return TrainOutcome.from_json(storage.read_json(str(folder / "outcome.json")))


def outcome_as_read(outcome: TrainOutcome) -> TrainOutcome:
    """Return the outcome after its way through JSON, where tuples are lists."""
    return TrainOutcome.from_json(json.loads(json.dumps(outcome.to_json())))
