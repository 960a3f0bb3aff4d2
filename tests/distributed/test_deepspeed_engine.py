"""Two worker processes over gloo: they train what one would, resume exactly, and fail together.

The file is also the worker: `python test_deepspeed_engine.py FOLDER RANK WORLD_SIZE`.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

STAGES = (0, 1, 2, 3)
RESUMED_STAGES = (2, 3)
TRUTH = torch.tensor([[1.0, -2.0, 0.5]])
GLOBAL_BATCH = 8


def draw(seed: int, size: int) -> dict[str, Tensor]:
    x = torch.randn(size, 3, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "y": x @ TRUTH.T}


# An odd number of batches, one of them short: the workers' shares do not come out even.
VALIDATION = [draw(901, 2), draw(902, 2), draw(903, 1)]


class ToyTask:
    """A regression; with `noise` from the generator, which differs between workers."""

    def __init__(self, noise: float) -> None:
        self.noise = noise

    def build(self) -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(3, 17), nn.Tanh(), nn.Linear(17, 1))

    def loss(self, module: nn.Module, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        noise = self.noise * torch.randn(batch["x"].shape, generator=generator)
        return (module(batch["x"] + noise) - batch["y"]).square().mean(), {"noise": noise.mean()}

    def validate(self, module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        error = (module(batch["x"]) - batch["y"]).square().mean(1)
        return {"psnr_y": -error, "gmsd": error}


class SharedBatches:
    """Global batches that depend on their number alone; a worker takes every `world`-th sample."""

    def __init__(self, rank: int, world: int, poison: int | None = None) -> None:
        self.rank, self.world, self.poison, self.number = rank, world, poison, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        self.number += 1
        batch = {name: value[self.rank :: self.world] for name, value in draw(self.number, GLOBAL_BATCH).items()}
        return {"x": batch["x"], "y": batch["y"] * float("nan")} if self.number == self.poison else batch

    def state(self) -> dict[str, object]:
        return {"number": self.number}

    def restore(self, state: dict[str, object]) -> None:
        self.number = int(str(state["number"]))


class Recorder:
    """Brings the shares of all workers together in one folder a step, as Ray does."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.metrics = folder, {}

    def on_metrics(self, step, values) -> None:
        self.metrics[step] = {name: values[name] for name in ("loss", "noise", "grad_norm", "lr")}

    def on_validation(self, step, values, decision) -> None:
        pass

    def on_checkpoint(self, step, folder, values) -> None:
        shutil.copytree(folder, self.folder / str(step), dirs_exist_ok=True)
        shutil.rmtree(folder)


def train(folder: Path, name: str, rank: int, world: int, *, stage: int, noise: float, resume=None, poison=None) -> dict[str, object]:
    from linearsr.guard import GuardConfig
    from linearsr_platform import storage
    from linearsr_platform.recipe.train_schema import KneeConfig, TrainConfig, ValidationConfig, ZeroConfig
    from linearsr_platform.train.engine import DeepSpeedEngine
    from linearsr_platform.train.job import TrainJob
    from linearsr_platform.train.loop import run_training

    config = TrainConfig(
        max_steps=8,
        batch_size=GLOBAL_BATCH,
        lr=0.02,
        clip_norm=1.0,
        workers=world,
        log_every=1,
        validate_every=4,
        checkpoint_every=4,
        zero=ZeroConfig(stage=stage),
        knee=KneeConfig(metrics=("psnr_y", "gmsd")),
        guard=GuardConfig(enabled=False),
    )
    job = TrainJob(
        name=name,
        task="unused:Unused",
        task_config=None,
        train=config,
        validation=ValidationConfig(),
        train_shards=(),
        validation_shards=(),
        output_url=str(folder / name),
    )
    engine = DeepSpeedEngine(ToyTask(noise), config, seed=1)
    recorder = Recorder(folder / f"{name}-checkpoints")
    batches = SharedBatches(rank, world, poison if rank == world - 1 else None)
    outcome = run_training(engine, batches, VALIDATION, job, recorder, resume=resume)
    engine.close()
    dist.barrier()
    weights = hashlib.sha256(storage.read_bytes(outcome.last_weights)).hexdigest()
    return {"history": outcome.history, "metrics": recorder.metrics, "weights": weights}


def work(folder: Path, rank: int, world: int) -> None:
    import deepspeed.comm.comm

    from linearsr_platform.train.recovery import TrainingDiverged

    results: dict[str, object] = {}
    for stage in STAGES:
        results[f"quiet-{stage}"] = train(folder, f"quiet-{stage}", rank, world, stage=stage, noise=0.0)
        if world > 1 and stage in RESUMED_STAGES:
            results[f"whole-{stage}"] = train(folder, f"whole-{stage}", rank, world, stage=stage, noise=0.1)
            half = folder / f"whole-{stage}-checkpoints" / "4"
            results[f"resumed-{stage}"] = train(folder, f"resumed-{stage}", rank, world, stage=stage, noise=0.1, resume=half)
    results["compiled"] = deepspeed.comm.comm.cdb.shm_comm_op is not None
    try:
        train(folder, "poisoned", rank, world, stage=2, noise=0.0, poison=3)
    except TrainingDiverged as error:
        results["error"] = str(error)
    (folder / f"rank_{rank}.json").write_text(json.dumps(results))


def run_workers(folder: Path, world: int) -> list[dict[str, dict]]:
    """Run `world` workers to their end and return what each found."""
    folder.mkdir()
    command = [sys.executable, __file__, str(folder)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(world)],
            env={**environment, "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        output = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * world, "\n".join(output)
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return run_workers(tmp_path_factory.mktemp("one") / "run", 1)[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    return run_workers(tmp_path_factory.mktemp("two") / "run", 2)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
def test_two_workers_train_what_one_does(one, two, stage: int) -> None:
    alone, together = one[f"quiet-{stage}"], two[0][f"quiet-{stage}"]
    for ours, theirs in zip(together["history"], alone["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for step, values in alone["metrics"].items():
        assert together["metrics"][step] == pytest.approx(values, rel=1e-3)
    assert two[1][f"quiet-{stage}"]["history"] == together["history"]


@pytest.mark.distributed
@pytest.mark.parametrize("stage", RESUMED_STAGES)
def test_two_workers_resume_to_the_bit(two, stage: int) -> None:
    whole, resumed = two[0][f"whole-{stage}"], two[0][f"resumed-{stage}"]
    assert resumed["metrics"] == {step: values for step, values in whole["metrics"].items() if int(step) > 4}
    assert resumed["history"] == whole["history"]
    assert resumed["weights"] == whole["weights"]
    assert whole["weights"] != two[0][f"quiet-{stage}"]["weights"]


@pytest.mark.distributed
def test_workers_fail_together_when_one_diverges(two) -> None:
    assert "train step 3: got loss nan" in two[0]["error"]
    assert two[0]["error"] == two[1]["error"]


@pytest.mark.distributed
def test_nothing_is_compiled(two) -> None:
    assert [worker["compiled"] for worker in two] == [False, False]


if __name__ == "__main__":
    torch.set_num_threads(1)
    shared, number, total = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{shared}/rendezvous", rank=number, world_size=total)
    work(shared, number, total)
    dist.barrier()
    dist.destroy_process_group()
    # Not through the interpreter's own end: a thread of torch or gloo that asks for the GIL there aborts the process, about once in
    # thirty pairs on a busy machine. Ray does not end its workers that way either.
    sys.stdout.flush()
    os._exit(0)
