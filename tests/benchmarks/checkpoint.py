"""What a full checkpoint costs, beside DeepSpeed's `save_checkpoint` of the same engine.

Run: `OMP_NUM_THREADS=1 python tests/benchmarks/checkpoint.py`. A network of 100.7 M parameters with AdamW in one process; both sides save
in turns to the same folder, and files are deleted in between. Ours is measured with the average of weights, as training saves it, and
without, which is what DeepSpeed saves. Blocked is the time that training stands still: for DeepSpeed all of it. CPU seconds are of the
process, all threads. Nothing is flushed to the disk, so memory is what is measured, not the disk. Exits with 1 if a target is missed.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import torch
from torch import Tensor, nn

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_RANK", "0")

from linearsr_platform.recipe.train_schema import TrainConfig, ZeroConfig
from linearsr_platform.train.checkpoint import Checkpoints, LoopState
from linearsr_platform.train.ema import ExponentialAverage
from linearsr_platform.train.engine import DeepSpeedEngine

WIDTH, LAYERS = 2048, 24
BLOCKED_S = 0.15
"""Target, a hundred million parameters."""
CPU_RATIO, SIZE_RATIO = 1.7, 0.76


class Wide:
    """A task whose network is nothing but parameters."""

    def build(self) -> nn.Module:
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))

    def loss(self, module: nn.Module, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return module(batch["x"]).square().mean(), {}


class NoAverage(ExponentialAverage):
    """Leaves the average out of checkpoints."""

    def spans(self) -> list:
        return []


class NoBatches:
    """A stream that is not read."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        raise StopIteration

    def state(self) -> dict[str, object]:
        return {}

    def restore(self, states) -> None:
        pass


@dataclass(frozen=True)
class Cost:
    """Of one checkpoint."""

    blocked_s: float
    whole_s: float
    cpu_s: float
    size_bytes: int


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def ours(checkpoints: Checkpoints, folder: Path, step: int) -> Cost:
    """Save once; the memory to copy to is there from the first time on."""
    cpu_s, start_s = process_time(), perf_counter()
    checkpoints.save(LoopState(step=step), NoBatches())
    blocked_s = perf_counter() - start_s
    checkpoints.settle(wait_for_it=True)
    cost = Cost(blocked_s, perf_counter() - start_s, process_time() - cpu_s, size_of(folder / f"step_{step:08d}"))
    shutil.rmtree(folder / f"step_{step:08d}")
    return cost


def deepspeeds(engine: DeepSpeedEngine, folder: Path) -> Cost:
    cpu_s, start_s = process_time(), perf_counter()
    engine._engine.save_checkpoint(str(folder), tag="deepspeed")
    took_s = perf_counter() - start_s
    cost = Cost(took_s, took_s, process_time() - cpu_s, size_of(folder / "deepspeed"))
    shutil.rmtree(folder / "deepspeed")
    return cost


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stage", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = TrainConfig(max_steps=1, batch_size=1, clip_norm=1.0, zero=ZeroConfig(stage=arguments.stage))
    engine = DeepSpeedEngine(Wide(), config, seed=0)
    engine.train_step([{"x": torch.randn(1, WIDTH)}], 1e-4)
    millions = LAYERS * WIDTH * WIDTH / 1e6
    costs: dict[str, list[Cost]] = {"DeepSpeed": [], "ours, no average": [], "ours": []}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        quiet = {"keep": 10**6, "codec": None, "seed": 0, "on_complete": lambda step: None, "on_message": sys.exit}
        plain = Checkpoints(str(folder), engine, NoAverage(engine, 0.9), **quiet)
        full = Checkpoints(str(folder), engine, ExponentialAverage(engine, 0.9), **quiet)
        for turn in range(arguments.rounds + 1):
            taken = (deepspeeds(engine, folder), ours(plain, folder, turn), ours(full, folder, turn))
            # The first round allocates.
            for name, cost in zip(costs, taken, strict=True):
                costs[name] += [cost] if turn else []
        plain.close()
        full.close()
    print(f"{millions:.1f} M parameters, ZeRO {arguments.stage}, medians of {arguments.rounds} rounds")
    print(f"{'':18} {'blocked s':>10} {'whole s':>8} {'CPU s':>7} {'MB':>7}")
    middle = {}
    for name, taken in costs.items():
        middle[name] = Cost(*(median(getattr(cost, key) for cost in taken) for key in ("blocked_s", "whole_s", "cpu_s", "size_bytes")))
        one = middle[name]
        print(f"{name:18} {one.blocked_s:10.3f} {one.whole_s:8.2f} {one.cpu_s:7.2f} {one.size_bytes / 1e6:7.0f}")
    theirs, alike = middle["DeepSpeed"], middle["ours, no average"]
    blocked_s = middle["ours"].blocked_s / millions * 100
    cpu, size = theirs.cpu_s / alike.cpu_s, alike.size_bytes / theirs.size_bytes
    print(f"blocked a hundred million parameters: {blocked_s:.3f} s (limit {BLOCKED_S})")
    print(f"DeepSpeed's CPU seconds to ours, both without the average: {cpu:.2f} (at least {CPU_RATIO}); size {size:.2f}")
    return int(blocked_s > BLOCKED_S or cpu < CPU_RATIO or size > SIZE_RATIO)


if __name__ == "__main__":
    sys.exit(main())
