"""Two worker processes over gloo under injected faults: both go back together, name the same layer, and end where they would have.

The file is also the worker: `python test_guarded_training.py FOLDER RANK`. Faults come from outside, by wrapping the task and the batches.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from linearsr.attention import LinearAttention

STAGES = (0, 1, 2, 3)
WORLD = 2
STEPS = 160
BAD_STEP = 87
LAYER = "1.qkv.weight"
NAN = float("nan")


def draw(seed: int, size: int) -> dict[str, Tensor]:
    x = torch.randn(size, 6, 3, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "y": (x * x.mean(dim=1, keepdim=True)).sum(-1, keepdim=True)}


class AttentionTask:
    """A regression over tokens through one linear attention; `fault` is told about every training loss."""

    def __init__(self, fault) -> None:
        self.fault = fault

    def build(self) -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(3, 16), LinearAttention(16, 8), nn.Tanh(), nn.Linear(16, 1))

    def loss(self, module: nn.Module, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        noise = 0.01 * torch.randn(batch["x"].shape, generator=generator)
        factor = self.fault(module, int(batch["number"]))
        return factor * (module(batch["x"] + noise) - batch["y"]).square().mean(), {}

    def validate(self, module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        error = (module(batch["x"]) - batch["y"]).square().mean((1, 2))
        return {"psnr_y": -error, "gmsd": error}


class Batches:
    """Batches that depend on number and worker alone and carry their number."""

    def __init__(self, rank: int) -> None:
        self.rank, self.number = rank, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        self.number += 1
        return {**draw(WORLD * self.number + self.rank, 4), "number": torch.tensor(self.number)}

    def state(self) -> dict[str, object]:
        return {"number": self.number}

    def restore(self, states) -> None:
        self.number = states[0]["number"]


class Recorder:
    """Keeps trips."""

    def __init__(self) -> None:
        self.trips = []

    def on_metrics(self, step, values) -> None:
        pass

    def on_validation(self, step, values, decision) -> None:
        pass

    def on_trip(self, step, trip) -> None:
        self.trips.append(trip.to_json())

    def on_start(self, step) -> None:
        pass

    def on_checkpoint(self, step) -> None:
        pass

    def on_message(self, step, text) -> None:
        pass


def spoil_gradient(module: nn.Module) -> float:
    """Make the next gradient of one layer NaN."""
    parameter = dict(module.named_parameters())[LAYER]
    handle = parameter.register_hook(lambda gradient: handle.remove() or gradient * NAN)
    return 1.0


class Quiet:
    """No fault."""

    def __init__(self, rank: int) -> None:
        self.rank, self.calls = rank, 0

    def __call__(self, module: nn.Module, number: int) -> float:
        self.calls += 1
        return 1.0


class NanOfOneBatch(Quiet):
    """The gradient of one layer is NaN on worker 1 whenever it meets one batch."""

    def __call__(self, module, number):
        return spoil_gradient(module) if self.rank == 1 and number == BAD_STEP else 1.0


class NanOnce(Quiet):
    """The same, but the batch is innocent: it comes once."""

    def __call__(self, module, number):
        super().__call__(module, number)
        return spoil_gradient(module) if self.rank == 1 and self.calls == BAD_STEP else 1.0


class NanForever(Quiet):
    """The same from one batch on."""

    def __call__(self, module, number):
        return spoil_gradient(module) if self.rank == 1 and number >= BAD_STEP else 1.0


class BadBatches(Quiet):
    """Worker 1 meets ten bad batches out of every forty."""

    def __call__(self, module, number):
        return 100.0 if self.rank == 1 and number >= BAD_STEP and number % 40 >= 30 else 1.0


FAULTS = {"quiet": Quiet, "once": NanOnce, "batch": NanOfOneBatch, "forever": NanForever, "data": BadBatches}


def train(folder: Path, name: str, rank: int, *, stage: int, precision: str = "float32") -> dict[str, object]:
    from linearsr_platform.recipe.train_schema import KneeConfig, TrainConfig, ValidationConfig, ZeroConfig
    from linearsr_platform.train.engine import DeepSpeedEngine
    from linearsr_platform.train.job import TrainJob
    from linearsr_platform.train.loop import run_training
    from linearsr_platform.train.recovery import TrainingDiverged

    config = TrainConfig(
        max_steps=STEPS,
        batch_size=8,
        lr=0.005,
        clip_norm=1.0,
        workers=WORLD,
        ema_decay=0.9,
        # Together with the low rate and many validation examples: two runs that should end alike then do so to 1 % on every machine.
        schedule="cosine",
        log_every=10,
        validate_every=40,
        checkpoint_every=20,
        precision=precision,
        zero=ZeroConfig(stage=stage),
        knee=KneeConfig(metrics=("psnr_y", "gmsd"), stop=False),
    )
    job = TrainJob(
        name=name,
        task="unused:Unused",
        task_config=None,
        train=config,
        validation=ValidationConfig(),
        train_shards=(),
        validation_shards=(),
        output_url=str(folder / f"{name}-{stage}"),
    )
    engine = DeepSpeedEngine(AttentionTask(FAULTS[name](rank)), config, seed=1)
    recorder, result = Recorder(), {}
    try:
        outcome = run_training(engine, Batches(rank), [draw(seed, 128) for seed in (901, 902)], job, recorder)
        result = {"history": outcome.history, "outcome": outcome.trips}
    except TrainingDiverged as error:
        result = {"error": str(error)}
    engine.close()
    dist.barrier()
    return {**result, "trips": recorder.trips}


def work(folder: Path, rank: int) -> None:
    runs = [(name, stage) for stage in STAGES for name in ("quiet", "batch")]
    runs += [("once", 2), ("forever", 2), ("forever", 3), ("data", 2)]
    results = {f"{name}-{stage}": train(folder, name, rank, stage=stage) for name, stage in runs}
    (folder / f"rank_{rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    """Run both workers to their end and return what each found."""
    folder = tmp_path_factory.mktemp("guard")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    # Files, not pipes: a worker whose pipe is full waits for a reader, and the other worker for it.
    logs = [folder / f"rank_{rank}.log" for rank in range(WORLD)]
    workers = []
    for rank, log in enumerate(logs):
        command = [sys.executable, __file__, str(folder), str(rank)]
        with log.open("w") as file:
            workers.append(subprocess.Popen(command, env={**environment, "LOCAL_RANK": str(rank)}, stdout=file, stderr=file))
    try:
        codes = [worker.wait(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert codes == [0] * WORLD, "\n".join(log.read_text()[-4000:] for log in logs)
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(WORLD)]


def ends(result: dict) -> float:
    return result["history"][-1]["gmsd"]


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
def test_nan_of_one_worker_takes_both_back_and_training_ends_where_it_would_have(both, stage: int) -> None:
    quiet, poisoned = both[0][f"quiet-{stage}"], both[0][f"batch-{stage}"]
    assert quiet["trips"] == []
    (trip,) = poisoned["trips"]
    assert (trip["step"], trip["detected_at"], trip["rolled_back_to"]) == (BAD_STEP, 90, 80)
    assert (trip["layer"], trip["evidence"]) == (LAYER, f"gradient of {LAYER} on worker 1: nan")
    assert poisoned["outcome"] == poisoned["trips"]
    assert both[1][f"batch-{stage}"] == poisoned
    assert ends(poisoned) == pytest.approx(ends(quiet), rel=0.02)


@pytest.mark.distributed
def test_a_fault_that_does_not_come_back_is_said_to_be_so(both) -> None:
    (trip,) = both[0]["once-2"]["trips"]
    assert trip["layer"] is None
    assert "not reproduced on replay" in trip["evidence"]
    assert both[1]["once-2"] == both[0]["once-2"]


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, 3])
def test_a_fault_that_stays_ends_training_on_both_workers_with_the_layer_named(both, stage: int) -> None:
    stopped = both[0][f"forever-{stage}"]
    assert [trip["action"] for trip in stopped["trips"]] == ["rolled back"] * 3 + ["stopped"]
    assert [trip["lr_scale"] for trip in stopped["trips"]][:1] == [0.5]
    assert f"first seen bad: gradient of {LAYER} on worker 1: nan" in stopped["error"]
    assert both[1][f"forever-{stage}"] == stopped


@pytest.mark.distributed
def test_bad_data_is_left_out_from_then_on(both) -> None:
    result = both[0]["data-2"]
    (trip,) = result["trips"]
    assert trip["bad_data"]
    assert trip["statistic"] in ("loss", "gradient norm")
    assert both[1]["data-2"] == result
    assert ends(result) == pytest.approx(ends(both[0]["quiet-2"]), rel=0.02)


if __name__ == "__main__":
    torch.set_num_threads(1)
    shared, number = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{shared}/rendezvous", rank=number, world_size=WORLD)
    work(shared, number)
    dist.barrier()
    dist.destroy_process_group()
    # As in test_deepspeed_engine.py: the interpreter's own end may abort.
    sys.stdout.flush()
    os._exit(0)
