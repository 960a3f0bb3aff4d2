"""Two worker processes over gloo: they train what one would, resume exactly, also as one and at another stage, and fail together.

The file is also the worker: `python test_deepspeed_engine.py FOLDER RANK WORLD_SIZE PART`.
"""

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from process_group import be_worker, run_group

STAGES = (0, 1, 2, 3)
RESUMED = [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (0, "bfloat16"), (2, "bfloat16"), (3, "bfloat16")]
MOVES = [("start", 2, 1, 4), ("one", 1, 3, 8), ("two", 2, 2, 12)]
"""Of a run that moves: part, workers, ZeRO stage, and the step it gets to."""
TRUTH = torch.tensor([[1.0, -2.0, 0.5]])
GLOBAL_BATCH = 8


def draw(seed: int, size: int) -> dict[str, Tensor]:
    x = torch.randn(size, 3, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "y": x @ TRUTH.T}


# An odd number of batches, one of them short: the workers' shares do not come out even.
VALIDATION = [draw(901, 2), draw(902, 2), draw(903, 1)]


def predict(module: nn.Module, x: Tensor) -> Tensor:
    return module(x.to(module[0].weight.dtype)).float()


class ToyTask:
    """A regression; with `noise` from the generator, which differs between workers."""

    def __init__(self, noise: float) -> None:
        self.noise = noise

    def build(self) -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(3, 17), nn.Tanh(), nn.Linear(17, 1))

    def loss(self, module: nn.Module, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        noise = self.noise * torch.randn(batch["x"].shape, generator=generator)
        return (predict(module, batch["x"] + noise) - batch["y"]).square().mean(), {"noise": noise.mean()}

    def validate(self, module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        error = (predict(module, batch["x"]) - batch["y"]).square().mean(1)
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

    def restore(self, states) -> None:
        self.number = states[0]["number"]


class Recorder:
    """Keeps the metrics."""

    def __init__(self) -> None:
        self.metrics = {}

    def on_metrics(self, step, values) -> None:
        self.metrics[step] = {name: values[name] for name in ("loss", "noise", "grad_norm", "lr")}

    def on_validation(self, step, values, decision) -> None:
        pass

    def on_start(self, step) -> None:
        pass

    def on_checkpoint(self, step) -> None:
        pass

    def on_message(self, step, text) -> None:
        raise AssertionError(text)


def train(
    folder: Path, name: str, rank: int, world: int, *, stage: int, noise: float, steps=8, precision="float32", resume=None, poison=None
) -> dict[str, object]:
    from linearsr.guard import GuardConfig
    from linearsr_platform import storage
    from linearsr_platform.recipe.train_schema import KneeConfig, TrainConfig, ValidationConfig, ZeroConfig
    from linearsr_platform.train.engine import DeepSpeedEngine
    from linearsr_platform.train.job import TrainJob
    from linearsr_platform.train.loop import run_training

    config = TrainConfig(
        max_steps=steps,
        batch_size=GLOBAL_BATCH,
        lr=0.02,
        clip_norm=1.0,
        workers=world,
        log_every=1,
        validate_every=4,
        checkpoint_every=4,
        keep_checkpoints=10,
        precision=precision,
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
    checkpoints = folder / f"{name}-checkpoints"
    if resume is not None and rank == 0:
        shutil.copytree(resume, checkpoints / resume.name)
    recorder = Recorder()
    batches = SharedBatches(rank, world, poison if rank == world - 1 else None)
    outcome = run_training(engine, batches, VALIDATION, job, recorder, checkpoints=str(checkpoints))
    engine.close()
    dist.barrier()
    weights = hashlib.sha256(storage.read_bytes(outcome.last_weights)).hexdigest()
    return {"history": outcome.history, "metrics": recorder.metrics, "weights": weights}


def copy_checkpoint(source: Path, target: Path, world: int, stage: int) -> None:
    """Load a checkpoint here, whoever wrote it, and save it again."""
    from linearsr_platform.recipe.train_schema import TrainConfig, ZeroConfig
    from linearsr_platform.train.checkpoint import Checkpoints
    from linearsr_platform.train.ema import ExponentialAverage
    from linearsr_platform.train.engine import DeepSpeedEngine

    config = TrainConfig(max_steps=1, batch_size=GLOBAL_BATCH, clip_norm=1.0, workers=world, zero=ZeroConfig(stage=stage))
    engine = DeepSpeedEngine(ToyTask(0.0), config, seed=1)
    average, batches = ExponentialAverage(engine, 0.9), SharedBatches(0, world)
    fixed = {"keep": 2, "codec": None, "seed": 1, "on_complete": lambda step: None, "on_message": print}
    old, new = (Checkpoints(str(folder), engine, average, **fixed) for folder in (source, target))
    state, said = old.restore(batches)
    assert said == []
    new.save(state, batches)
    new.settle(wait_for_it=True)
    old.close()
    new.close()
    engine.close()


def work(folder: Path, rank: int, world: int, arguments: list[str]) -> None:
    (part,) = arguments
    results: dict[str, object] = {}
    if part == "all":
        results = work_all(folder, rank, world)
    for name, _, stage, steps in MOVES:
        if name == part:
            results["moved"] = train(folder, "moved", rank, world, stage=stage, noise=0.0, steps=steps)
            if part == "start":
                results["undisturbed"] = train(folder, "undisturbed", rank, world, stage=stage, noise=0.0, steps=MOVES[-1][-1])
            else:
                copies = ("moved-checkpoints", "copy-one") if part == "one" else ("copy-one", "copy-two")
                copy_checkpoint(folder / copies[0], folder / copies[1], world, stage)
    (folder / f"{part}-{rank}.json").write_text(json.dumps(results))


def work_all(folder: Path, rank: int, world: int) -> dict[str, object]:
    import deepspeed.comm.comm

    from linearsr_platform.train.recovery import TrainingDiverged

    results: dict[str, object] = {}
    for stage in STAGES:
        results[f"quiet-{stage}"] = train(folder, f"quiet-{stage}", rank, world, stage=stage, noise=0.0)
    for stage, precision in RESUMED if world > 1 else []:
        whole, resumed, setting = f"whole-{stage}-{precision}", f"resumed-{stage}-{precision}", {"stage": stage, "precision": precision}
        results[whole] = train(folder, whole, rank, world, noise=0.1, **setting)
        half = folder / f"{whole}-checkpoints" / "step_00000004"
        results[resumed] = train(folder, resumed, rank, world, noise=0.1, resume=half, **setting)
    results["compiled"] = deepspeed.comm.comm.cdb.shm_comm_op is not None
    results["compiler"] = "torch._inductor.compile_fx" in sys.modules
    try:
        train(folder, "poisoned", rank, world, stage=2, noise=0.0, poison=3)
    except TrainingDiverged as error:
        results["error"] = str(error)
    return results


def run_workers(folder: Path, world: int, part: str = "all") -> list[dict[str, dict]]:
    """Run `world` workers to their end and return what each found."""
    folder.mkdir(exist_ok=True)
    run_group(__file__, folder, world, [part])
    return [json.loads((folder / f"{part}-{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return run_workers(tmp_path_factory.mktemp("one") / "run", 1)[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    folder = tmp_path_factory.mktemp("two") / "run"
    results = run_workers(folder, 2)
    for result in results:
        result["folder"] = folder
    return results


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict]]:
    """Run the parts of `MOVES` one after the other in one folder."""
    folder = tmp_path_factory.mktemp("moved") / "run"
    return folder, {part: run_workers(folder, world, part)[0] for part, world, _, _ in MOVES}


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
def test_two_workers_train_what_one_does(one, two, stage: int) -> None:
    alone, together = one[f"quiet-{stage}"], two[0][f"quiet-{stage}"]
    for ours, theirs in zip(together["history"], alone["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for step, values in alone["metrics"].items():
        assert together["metrics"][step] == pytest.approx(values, rel=1e-3)
    assert two[1][f"quiet-{stage}"]["history"] == together["history"]


def left_behind(folder: Path) -> list[dict[str, object]]:
    """Return what the workers' records say of a checkpoint, but for times: among it the hash of weights, moments, average and noise."""
    records = [json.loads(file.read_text()) for file in sorted(folder.glob("rank_*.json"))]
    for record in records:
        del record["attempt"]
        for name in ("seconds", "train_seconds"):
            (record["loop"] or {}).pop(name, None)
    return records


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "precision"), RESUMED)
def test_two_workers_resume_to_the_bit(two, stage: int, precision: str) -> None:
    names = [f"{kind}-{stage}-{precision}" for kind in ("whole", "resumed")]
    whole, resumed = (two[0][name] for name in names)
    assert resumed["metrics"] == {step: values for step, values in whole["metrics"].items() if int(step) > 4}
    assert resumed["history"] == whole["history"]
    assert resumed["weights"] == whole["weights"]
    assert whole["weights"] != two[0][f"quiet-{stage}"]["weights"]
    records = [left_behind(two[0]["folder"] / f"{name}-checkpoints" / "step_00000008") for name in names]
    assert records[0] == records[1]
    assert [record["batches"] for record in records[0]] == [{"number": 8}] * 2


def whole_tensors(folder: Path) -> dict[str, Tensor]:
    """Put together what the workers of a checkpoint wrote; every number exactly once."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("rank_*.json")):
        parts = load_file(file.with_suffix(".safetensors"))
        for key, run in json.loads(file.read_text())["runs"].items():
            whole = tensors.setdefault(key, torch.full((math.prod(run["shape"]),), math.nan))
            assert whole[run["start"] : run["stop"]].isnan().all()
            whole[run["start"] : run["stop"]] = parts[key]
    return tensors


@pytest.mark.distributed
def test_other_workers_at_another_stage_load_what_was_saved_to_the_bit(moved) -> None:
    folder, _ = moved
    saved = whole_tensors(folder / "moved-checkpoints" / "step_00000008")
    assert len(saved) == 16
    assert not any(value.isnan().any() for value in saved.values())
    for name, workers in (("copy-one", 1), ("copy-two", 2)):
        copied = folder / name / "step_00000008"
        assert len(list(copied.glob("rank_*.json"))) == workers
        again = whole_tensors(copied)
        assert again.keys() == saved.keys()
        assert [key for key in saved if not torch.equal(again[key], saved[key])] == []


@pytest.mark.distributed
def test_a_run_that_moves_learns_what_it_would_have_learned(moved) -> None:
    _, parts = moved
    expected = parts["start"]["undisturbed"]
    metrics = {step: values for part in parts.values() for step, values in part["moved"]["metrics"].items()}
    assert metrics.keys() == expected["metrics"].keys()
    for step, values in expected["metrics"].items():
        assert metrics[step] == pytest.approx(values, rel=1e-5)
    for point, other in zip(parts["two"]["moved"]["history"], expected["history"], strict=True):
        assert point == pytest.approx(other, rel=1e-5)


@pytest.mark.distributed
def test_workers_fail_together_when_one_diverges(two) -> None:
    assert "train step 3: got loss nan" in two[0]["error"]
    assert two[0]["error"] == two[1]["error"]


@pytest.mark.distributed
def test_nothing_is_compiled(two) -> None:
    assert [worker["compiled"] for worker in two] == [False, False]
    # What DeepSpeed imports and nobody here uses would bring it: 2 CPU seconds a worker.
    assert [worker["compiler"] for worker in two] == [False, False]


if __name__ == "__main__":
    be_worker(work)
