"""What the guard and the knee detector add to a training step.

Run: `OMP_NUM_THREADS=1 python tests/benchmarks/guard_overhead.py`. Two whole training loops on the nano network, one with the guard and
one without, take turns step by step in one process on the same batch, and are compared by the CPU time of whole windows of `--log-every`
steps, because the guard does most of its work once a window. The ratio is of the medians over windows; both loops alternate in going
first. The detector is timed by itself, a decision over `--points` validations, and its share is that of one decision every
`--validate-every` steps; so is a restore point, one every `--checkpoint-every`. Exits with 1 if all of it is over `--limit`.
"""

import argparse
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import thread_time

import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_RANK", "0")

from step_overhead import Batch, Silent, quickstart_task

from linearsr.guard import GuardConfig
from linearsr.knee import KneeDetector
from linearsr.metric_table import metric_spec
from linearsr_platform.recipe.train_schema import KneeConfig, TrainConfig, ValidationConfig, ZeroConfig
from linearsr_platform.train.engine import DeepSpeedEngine
from linearsr_platform.train.job import TrainJob
from linearsr_platform.train.loop import run_training

NEVER = 10**9


class Turns:
    """Lets two loops, each in its own thread, take steps in turns."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.order: list[int] = []
        self.waiting = {0, 1}

    def wait(self, side: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.next() == side)

    def done(self, side: int) -> None:
        with self.changed:
            self.order.append(side)
            self.changed.notify_all()

    def next(self) -> int:
        """Alternate in pairs, the one that went second going first: 0 1 1 0 0 1 1 0."""
        return (0, 1, 1, 0)[len(self.order) % 4]


class Timed:
    """The same batch again and again; between two calls of one loop lies one of its steps, measured on its own thread."""

    def __init__(self, batch: Batch, turns: Turns, side: int) -> None:
        self.batch, self.turns, self.side = batch, turns, side
        self.steps_s: list[float] = []
        self.handed_out_s: float | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.handed_out_s is not None:
            self.steps_s.append(thread_time() - self.handed_out_s)
            self.turns.done(self.side)
        self.turns.wait(self.side)
        self.handed_out_s = thread_time()
        return self.batch

    def state(self) -> dict[str, object]:
        return {}

    def restore(self, states) -> None:
        pass


def config_of(arguments: argparse.Namespace, guard: GuardConfig) -> TrainConfig:
    return TrainConfig(
        max_steps=arguments.steps,
        batch_size=arguments.batch_size,
        crop_px=arguments.crop_px,
        log_every=arguments.log_every,
        validate_every=NEVER,
        checkpoint_every=NEVER,
        zero=ZeroConfig(stage=arguments.stage),
        guard=guard,
    )


def measure(arguments: argparse.Namespace) -> tuple[list[float], list[float], float]:
    """Train both and return the CPU seconds of their windows, unguarded first, and those of one restore point."""
    task, turns = quickstart_task(arguments.crop_px), Turns()
    generator = torch.Generator().manual_seed(0)
    sides = {"hr": arguments.crop_px, "lr": arguments.crop_px // task.config.model.scale}
    count = arguments.batch_size
    batch = {name: torch.randint(0, 256, (count, 3, side, side), generator=generator).byte() for name, side in sides.items()}
    batch["tags"] = torch.zeros(count, task.config.model.tags.max_tags, dtype=torch.int64)
    side = arguments.crop_px // 4
    validation = {**batch, "noise": torch.randn(count, task.config.model.codec.latent_channels, side, side, generator=generator)}
    configs = [config_of(arguments, guard) for guard in (GuardConfig(enabled=False), GuardConfig())]
    engines = [DeepSpeedEngine(task, config, seed=0) for config in configs]
    streams = [Timed(batch, turns, side) for side in (0, 1)]
    # Builds the metrics before there are threads: a library behind them redirects standard output while it loads.
    task.validate(task.build(), validation)
    with tempfile.TemporaryDirectory() as folder:

        def train(number: int) -> None:
            torch.set_num_threads(1)
            job = TrainJob(
                name=f"side-{number}", task="linearsr.task:SuperResolutionTask", task_config=task.config, train=configs[number],
                validation=ValidationConfig(), train_shards=(), validation_shards=(), output_url=str(Path(folder, str(number))),
            )  # fmt: skip
            run_training(engines[number], streams[number], [validation], job, Silent())
            turns.done(number)

        threads = [threading.Thread(target=train, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    captures_s = []
    for _ in range(10):
        start_s = thread_time()
        engines[1].capture()
        captures_s.append(thread_time() - start_s)
    for engine in engines:
        engine.close()
    windows = [in_windows(stream.steps_s, arguments.log_every) for stream in streams]
    return windows[0][1:], windows[1][1:], median(captures_s)


def in_windows(steps_s: list[float], size: int) -> list[float]:
    """Add up whole windows of `size` steps."""
    return [sum(steps_s[start : start + size]) for start in range(0, len(steps_s) - size + 1, size)]


def decision_s(points: int) -> float:
    """Return the CPU seconds of one decision of the knee detector, and of what prunes snapshots, after `points` validations."""
    knee = KneeConfig()
    orientations = {name: metric_spec(name).higher_is_better for name in knee.metrics}
    detector = KneeDetector(orientations, patience=knee.patience, min_points=knee.min_points)
    generator = torch.Generator().manual_seed(0)
    spent_s = []
    for point in range(points):
        noise = torch.randn(len(orientations), generator=generator).tolist()
        values = {name: (point + 0.1 * noise[i]) * (1 if higher else -1) for i, (name, higher) in enumerate(orientations.items())}
        start_s = thread_time()
        detector.update(point, values)
        detector.candidates(knee.keep)
        spent_s.append(thread_time() - start_s)
    return median(spent_s[points // 2 :])


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=2, choices=(0, 1, 2, 3), help="ZeRO stage")
    parser.add_argument("--steps", type=int, default=400, help="steps of each side")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--crop-px", type=int, default=128)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--validate-every", type=int, default=100)
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--points", type=int, default=100, help="validations that the detector has seen")
    parser.add_argument("--limit", type=float, default=0.01, help="largest accepted share of a step")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    without_s, with_s, capture_s = measure(arguments)
    step_s = median(without_s) / arguments.log_every
    guard = median(with_s) / median(without_s) - 1
    detector = decision_s(arguments.points) / arguments.validate_every / step_s
    points = capture_s / arguments.checkpoint_every / step_s
    total = guard + detector + points
    shape = f"batch {arguments.batch_size} of {arguments.crop_px} px"
    print(f"ZeRO {arguments.stage}, {shape}, {len(with_s)} windows of {arguments.log_every} steps")
    print(f"step without {1e3 * step_s:.2f} ms; guard {guard:+.2%}, knee detector {detector:+.2%}, restore points {points:+.2%}")
    print(f"together {total:+.2%} of a step (limit {arguments.limit:.2%})")
    return int(total > arguments.limit)


if __name__ == "__main__":
    sys.exit(main())
