"""What the guard and the knee detector add to a training step, part by part.

Run: `OMP_NUM_THREADS=1 python tests/benchmarks/guard_overhead.py`. The difference of two training loops is lost in the noise of a step,
which is ten times what is looked for. So each call that the guard and the detector add to the loop is timed by itself, in CPU time, and
divided by how many steps it serves and by the median step without it, measured in between. Only the probes run inside a step: that step is
taken with and without them, on the same batch, without - with - without, and the middle one is compared with the mean of its neighbours;
the neighbours' own difference is the control, which must hold 0. The limits are computed from a full history, the detector decides on
`--points` validations. Every part is a median with a 95 % bootstrap interval, and so is their sum. Exits with 1 unless the whole interval
of the sum lies under `--limit`. `--burn 0.02` spends that share of a step in vain besides, to see that it is seen.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from time import process_time

import numpy as np
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_RANK", "0")

from step_overhead import Batch, quickstart_task

from linearsr.guard import AttentionReading, GuardConfig, StepReading
from linearsr.knee import KneeDetector
from linearsr.metric_table import metric_spec
from linearsr_platform.recipe.train_schema import KneeConfig, TrainConfig, ZeroConfig
from linearsr_platform.train.checkpoint import LoopState
from linearsr_platform.train.ema import ExponentialAverage
from linearsr_platform.train.engine import DeepSpeedEngine
from linearsr_platform.train.recovery import Recovery
from linearsr_platform.train.results import StepResult
from linearsr_platform.train.window import MetricWindow

DRAWS = 2000
WARM_UP = 3
"""First rounds that are not counted."""


@dataclass
class Part:
    """CPU seconds of one piece of extra work, time and again, and how many steps each serves."""

    every: int
    samples_s: list[float] = field(default_factory=list)

    def per_step_s(self, rng: np.random.Generator) -> np.ndarray:
        """Return (1 + DRAWS,) medians by step: of what was measured, then of bootstrap draws from it."""
        measured = np.array(self.samples_s)
        drawn = measured[rng.integers(0, len(measured), (DRAWS, len(measured)))]
        return np.concatenate([[np.median(measured)], np.median(drawn, axis=1)]) / self.every


def cpu_s(work: Callable[[], object]) -> float:
    """Return the CPU seconds that a call takes."""
    start_s = process_time()
    work()
    return process_time() - start_s


def burn(seconds: float) -> None:
    """Spend CPU time."""
    end_s = process_time() + seconds
    while process_time() < end_s:
        pass


def random_batch(task, count: int, crop_px: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    sides = {"hr": crop_px, "lr": crop_px // task.config.model.scale}
    batch = {name: torch.randint(0, 256, (count, 3, side, side), generator=generator).byte() for name, side in sides.items()}
    return {**batch, "tags": torch.zeros(count, task.config.model.tags.max_tags, dtype=torch.int64)}


class Rounds:
    """Takes steps with and without probes, and the guard's calls in between as the training loop makes them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        window, self.burn_share = arguments.log_every, arguments.burn
        guard = GuardConfig()
        config = TrainConfig(
            max_steps=10**9, batch_size=arguments.batch_size, crop_px=arguments.crop_px, log_every=window,
            zero=ZeroConfig(stage=arguments.stage), guard=guard,
        )  # fmt: skip
        task = quickstart_task(arguments.crop_px)
        self.batch, self.config = random_batch(task, arguments.batch_size, arguments.crop_px), config
        self.engine = DeepSpeedEngine(task, config, seed=0)
        self.average = ExponentialAverage(self.engine, config.ema_decay)
        self.recovery, self.state = Recovery(self.engine, self.average, config), LoopState()
        self.rng = np.random.default_rng(0)
        self.steps_s: list[float] = []
        self.control_s: list[float] = []
        self.parts = {
            "attention probes": Part(window),
            "batches kept for a replay": Part(1),
            "rate and loss limit": Part(1),
            "columns in the collective": Part(window),
            "checks of a window": Part(window),
            "check of a validation": Part(config.validate_every),
            "restore points": Part(config.checkpoint_every),
        }
        if self.burn_share:
            self.parts["burnt in vain"] = Part(window)
        # A full history: the limits are medians over all of it.
        for _ in range(0, guard.history + window, window):
            self.state.step += window
            self.check(self.readings())

    def readings(self) -> list[StepReading]:
        """Return a window of sound steps, the last of them the present one."""
        first = self.state.step - self.config.log_every + 1
        values = self.rng.normal(1.0, 0.05, (self.config.log_every, 2))
        return [StepReading(first + i, float(loss), float(norm)) for i, (loss, norm) in enumerate(values)]

    def check(self, steps: list[StepReading]) -> None:
        attention = [AttentionReading(layer, 0, 0.5, 0.0, 3.0, 9.0) for layer in self.engine.attentions]
        if self.recovery.check_steps(steps, steps[0].step, attention) is not None:
            raise RuntimeError("guard_overhead: a clean window tripped the guard")

    def step(self, probe: bool) -> tuple[StepResult, float]:
        start_s = process_time()
        result = self.engine.train_step([self.batch], 1e-4, probe=probe)
        return result, process_time() - start_s

    def take(self) -> None:
        """Measure everything once."""
        (plain, before_s), (watched, with_s), (_, after_s) = self.step(False), self.step(True), self.step(False)
        self.steps_s += [before_s, after_s]
        self.control_s.append(after_s - before_s)
        add = {name: part.samples_s.append for name, part in self.parts.items()}
        add["attention probes"](with_s - (before_s + after_s) / 2)
        window, state, recovery = self.config.log_every, self.state, self.recovery
        # As far from the last restore point as the next one is, so that it is taken.
        state.step += self.config.checkpoint_every
        steps = self.readings()
        add["batches kept for a replay"](sum(cpu_s(lambda n=each.step: recovery.record(n, [self.batch])) for each in steps) / window)
        calls_s = cpu_s(lambda: [(recovery.loss_limit(state), recovery.lr_scale(state, each.step)) for each in steps])
        add["rate and loss limit"](calls_s / window)
        bare, full = [plain] * window, [watched] + [plain] * (window - 1)
        # The first one after a step finds the cache cold.
        _, before_s, columns_s, after_s = (self.flush(results) for results in (full, bare, full, bare))
        add["columns in the collective"](columns_s - (before_s + after_s) / 2)
        add["checks of a window"](cpu_s(lambda: self.check(steps)))
        add["check of a validation"](cpu_s(lambda: recovery.check_validation(state.step, {"psnr_y": 30.0, "ssim_y": 0.9, "gmsd": 0.1}, {})))
        add["restore points"](cpu_s(lambda: recovery.remember(state)))
        if self.burn_share:
            add["burnt in vain"](cpu_s(lambda: burn(self.burn_share * window * float(np.median(self.steps_s)))))

    def flush(self, results: list[StepResult]) -> float:
        window = MetricWindow(self.engine.attentions)
        for result in results:
            window.add(result)
        return cpu_s(lambda: window.flush(self.state.step, 0.0))

    def forget(self) -> None:
        """Drop what was measured so far."""
        for samples_s in (self.steps_s, self.control_s, *(part.samples_s for part in self.parts.values())):
            samples_s.clear()


def decisions(points: int, every: int) -> Part:
    """Time the detector's decisions, and what prunes snapshots, in the second half of `points` validations."""
    knee, rng = KneeConfig(), np.random.default_rng(0)
    orientations = {name: metric_spec(name).higher_is_better for name in knee.metrics}
    detector = KneeDetector(orientations, patience=knee.patience, min_points=knee.min_points)
    part = Part(every)
    for point in range(points):
        noise = rng.normal(size=len(orientations))
        values = {name: (point + 0.1 * noise[i]) * (1 if higher else -1) for i, (name, higher) in enumerate(orientations.items())}
        spent_s = cpu_s(lambda n=point, v=values: (detector.update(n, v), detector.candidates(knee.keep)))
        part.samples_s += [spent_s] if point >= points // 2 else []
    return part


def line(name: str, shares: np.ndarray) -> str:
    """Return one line of the table: the share, and between which 95 % of the draws lie."""
    low, high = np.quantile(shares[1:], (0.025, 0.975))
    return f"{name:28} {shares[0]:+8.3%}   {low:+8.3%} to {high:+8.3%}"


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=2, choices=(0, 1, 2, 3), help="ZeRO stage")
    parser.add_argument("--rounds", type=int, default=100, help="three steps and all extra work each")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--crop-px", type=int, default=128)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--points", type=int, default=100, help="validations that the detector has seen")
    parser.add_argument("--limit", type=float, default=0.01, help="largest accepted share of a step")
    parser.add_argument("--burn", type=float, default=0.0, help="share of a step to spend in vain, as a test of this benchmark")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds = Rounds(arguments)
    for number in range(WARM_UP + arguments.rounds):
        if number == WARM_UP:
            rounds.forget()
        rounds.take()
    rounds.engine.close()
    parts = {**rounds.parts, "knee detector": decisions(arguments.points, rounds.config.validate_every)}
    rng = np.random.default_rng(0)
    step_s = Part(1, rounds.steps_s).per_step_s(rng)
    shares = {name: part.per_step_s(rng) / step_s for name, part in parts.items()}
    total = np.sum(list(shares.values()), axis=0)
    print(f"ZeRO {arguments.stage}, batch {arguments.batch_size} of {arguments.crop_px} px, {arguments.rounds} rounds")
    print(f"step without guard {1e3 * step_s[0]:.2f} ms of CPU time\n\n{'part':28} {'of a step':>8}   95 % interval")
    for name, share in shares.items():
        print(line(name, share))
    print(line("together", total))
    print(line("control: no probe, no probe", Part(arguments.log_every, rounds.control_s).per_step_s(rng) / step_s))
    high = float(np.quantile(total[1:], 0.975))
    good = high <= arguments.limit
    print(f"\n{'ok' if good else 'BAD'}: at most {high:.2%} of a step, limit {arguments.limit:.2%}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
