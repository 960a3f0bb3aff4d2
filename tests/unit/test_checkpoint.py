"""Checkpoints: the same numbers at every ZeRO stage and precision, whole or not at all, and never the end of a run by themselves."""

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from linearsr_platform import storage
from linearsr_platform.errors import StageError, UserError
from linearsr_platform.recipe.train_schema import KneeConfig, TrainConfig, ValidationConfig, ZeroConfig
from linearsr_platform.train.checkpoint import Checkpoints, LoopState
from linearsr_platform.train.checkpoint_store import checkpoint_name, names_in, parse_checkpoint_name
from linearsr_platform.train.ema import ExponentialAverage
from linearsr_platform.train.engine import DeepSpeedEngine
from linearsr_platform.train.job import TrainJob
from linearsr_platform.train.loop import run_training

FULL_DISK_BYTES = 4000
"""Larger than snapshots of the toy's 193 weights, smaller than a checkpoint of 16 bytes a weight."""


class Network(nn.Module):
    """Two layers, one frozen parameter and one buffer that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 31), nn.Linear(31, 1)
        self.frozen = nn.Parameter(torch.full((3, 5), 0.7), requires_grad=False)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.to(self.first.weight.dtype)).tanh()
        return self.last(hidden * self.frozen.mean()).float()


class ToyTask:
    """A regression with noise; PSNR rises to a knee and falls."""

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return Network()

    def loss(self, module, batch, generator):
        module.seen += 1
        noise = 0.1 * torch.randn(batch["x"].shape, generator=generator)
        return (module(batch["x"] + noise) - batch["x"].sum(1, keepdim=True)).square().mean(), {}

    def validate(self, module, batch):
        return {"psnr_y": -(module(batch["x"]) - batch["x"].sum(1, keepdim=True)).square().mean(1)}


class Batches:
    """Batches that depend on their number alone."""

    def __init__(self) -> None:
        self.number = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        self.number += 1
        return {"x": torch.randn(8, 4, generator=torch.Generator().manual_seed(self.number))}

    def state(self) -> dict[str, object]:
        return {"number": self.number}

    def restore(self, states) -> None:
        (state,) = states
        self.number = state["number"]


@dataclass
class Recorder:
    """Keeps what the loop tells."""

    starts: list[int] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    on_step: Callable[[int], None] = lambda step: None

    def on_start(self, step) -> None:
        self.starts.append(step)

    def on_metrics(self, step, values) -> None:
        self.on_step(step)

    def on_validation(self, step, values, decision) -> None:
        pass

    def on_trip(self, step, trip) -> None:
        pass

    def on_checkpoint(self, step) -> None:
        self.checkpoints.append(step)

    def on_message(self, step, text) -> None:
        self.messages.append(text)


def config(stage: int = 0, **settings) -> TrainConfig:
    every = {"log_every": 1, "validate_every": 10, "checkpoint_every": 10, "max_steps": 40}
    knee = KneeConfig(metrics=("psnr_y",), stop=False)
    return TrainConfig(
        **{"batch_size": 8, "lr": 0.01, "clip_norm": 1.0, "zero": ZeroConfig(stage=stage), "knee": knee, **every, **settings}
    )


def train(
    folder: Path,
    settings: TrainConfig,
    on_step: Callable[[int], None] = lambda step: None,
    *,
    task: ToyTask | None = None,
    checkpoints: str | None = None,
):
    job = TrainJob(
        name="toy",
        task="unused:Unused",
        task_config=None,
        train=settings,
        validation=ValidationConfig(),
        train_shards=(),
        validation_shards=(),
        output_url=str(folder),
    )
    engine, recorder = DeepSpeedEngine(task or ToyTask(), settings, seed=1), Recorder(on_step=on_step)
    try:
        validation = [{"x": torch.randn(4, 4, generator=torch.Generator().manual_seed(77))}]
        return run_training(engine, Batches(), validation, job, recorder, checkpoints=checkpoints or str(folder / "checkpoints")), recorder
    finally:
        engine.close()


@pytest.fixture(autouse=True)
def worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")


@contextmanager
def checkpoints_of(folder: Path, stage: int, precision: str):
    """Give the checkpoints of a fresh engine, and a function that returns all its numbers by name."""
    engine = DeepSpeedEngine(ToyTask(), config(stage, precision=precision), seed=1)
    average = ExponentialAverage(engine, 0.9)
    told: list[str] = []
    checkpoints = Checkpoints(
        str(folder), engine, average, keep=2, codec=None, seed=3, on_complete=lambda step: None, on_message=told.append
    )

    def numbers() -> dict[str, Tensor]:
        return {span.key: span.values.clone() for span in [*engine.spans(), *average.spans()]}

    try:
        yield checkpoints, engine, average, numbers
    finally:
        checkpoints.close()
        engine.close()
    assert told == []


PLACES = [
    (0, "float32"),
    (1, "float32"),
    (2, "float32"),
    (3, "float32"),
    (0, "bfloat16"),
    (1, "bfloat16"),
    (2, "bfloat16"),
    (3, "bfloat16"),
]


@pytest.mark.parametrize(("stage", "precision"), PLACES)
def test_every_stage_and_precision_reads_what_any_wrote(tmp_path: Path, stage: int, precision: str) -> None:
    with checkpoints_of(tmp_path, stage, precision) as (checkpoints, engine, average, numbers):
        batches = Batches()
        for step in range(1, 4):
            engine.train_step([next(batches)], 0.01)
            average.update(step)
        checkpoints.save(LoopState(step=3), batches)
        checkpoints.settle(wait_for_it=True)
        saved, optimizer_step, noise = numbers(), engine.optimizer_step(), engine.generator.get_state()
    assert set(saved) == {
        *(
            f"{kind}/{name}.{part}"
            for kind in ("weight", "exp_avg", "exp_avg_sq", "average")
            for name in ("first", "last")
            for part in ("weight", "bias")
        ),
        "buffer/seen",
        "frozen/frozen",
    }
    assert all(value.any() for value in saved.values())
    for other in (0, 1, 2, 3):
        with checkpoints_of(tmp_path, other, precision) as (checkpoints, engine, average, numbers):
            place = Batches()
            state, said = checkpoints.restore(place)
            assert (state, said, place.number) == (LoopState(step=3), [], 3)
            assert torch.equal(engine.generator.get_state(), noise)
            found = numbers()
            assert found.keys() == saved.keys()
            assert [key for key, value in found.items() if not torch.equal(value, saved[key])] == []
            assert engine.optimizer_step() == optimizer_step
            # Published, and the network runs on.
            assert engine.full_weights()["first.weight"].flatten().tolist() == saved["weight/first.weight"].tolist()
            assert engine.train_step([next(place)], 0.01).loss.isfinite()


def test_masters_of_bfloat16_go_on_in_float32_and_back(tmp_path: Path) -> None:
    before: dict[str, Tensor] = {}
    for stage, precision in ((2, "bfloat16"), (1, "float32"), (3, "bfloat16")):
        with checkpoints_of(tmp_path, stage, precision) as (checkpoints, engine, average, numbers):
            state, _ = checkpoints.restore(Batches())
            if state is not None:
                trained = {key: value for key, value in numbers().items() if key.partition("/")[0] not in ("buffer", "frozen")}
                assert [key for key, value in trained.items() if not torch.equal(value, before[key])] == []
            step = 1 if state is None else state.step + 1
            engine.train_step([next(Batches())], 0.01)
            average.update(step)
            checkpoints.save(LoopState(step=step), Batches())
            checkpoints.settle(wait_for_it=True)
            before = numbers()


def spoil(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(bytes(content))


DAMAGES = {
    "one bit": (
        lambda folder: spoil(folder / "rank_0.safetensors"),
        "rank_0.safetensors has another content than was written: its hash differs",
    ),
    "cut short": (lambda folder: os.truncate(folder / "rank_0.safetensors", 1000), "rank_0.safetensors has 1000 bytes instead of"),
    "missing": (lambda folder: (folder / "rank_0.safetensors").unlink(), "rank_0.safetensors is missing"),
    "foreign record": (lambda folder: (folder / "rank_0.json").write_text('{"workers": 1}'), "rank_0.json is no record of a worker"),
    "no record": (lambda folder: (folder / "rank_0.json").write_text('{"workers": '), "rank_0.json is not JSON"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_it_is_said(tmp_path: Path, kind: str) -> None:
    whole, _ = train(tmp_path / "whole", config(max_steps=30))
    train(tmp_path / "cut", config(max_steps=20))
    harm, told = DAMAGES[kind]
    harm(tmp_path / "cut" / "checkpoints" / "step_00000020")
    outcome, recorder = train(tmp_path / "cut", config(max_steps=30))
    assert recorder.starts == [10]
    (message,) = recorder.messages
    assert message.startswith(f"checkpoint step_00000020 is damaged ({told}")
    assert message.endswith("), going on from step_00000010")
    assert outcome.messages == recorder.messages
    assert storage.read_bytes(outcome.last_weights) == storage.read_bytes(whole.last_weights)


def test_without_a_whole_one_training_starts_over_and_it_is_said(tmp_path: Path) -> None:
    train(tmp_path, config(max_steps=10))
    spoil(tmp_path / "checkpoints" / "step_00000010" / "rank_0.safetensors")
    _, recorder = train(tmp_path, config(max_steps=20))
    assert recorder.starts == [0]
    assert recorder.messages[0].endswith("there is none before it, starting over")
    assert names_in(str(tmp_path / "checkpoints")) == ["step_00000020", "step_00000010"]


def test_what_was_never_finished_is_passed_over_and_removed(tmp_path: Path) -> None:
    train(tmp_path, config(max_steps=20))
    folder = tmp_path / "checkpoints"
    (folder / "step_00000020" / "rank_0.json").unlink()
    (folder / "step_00000020" / "rank_0.part-12345678.safetensors").write_bytes(b"half")
    seen: list[list[str]] = []
    _, recorder = train(tmp_path, config(max_steps=30), on_step=lambda step: seen.append(names_in(str(folder))))
    assert (recorder.starts, recorder.messages) == ([10], [])
    assert seen[0] == ["step_00000010"]
    assert [path.name for path in folder.rglob("*part-*")] == []


def test_files_are_plain_safetensors_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    outcome, recorder = train(tmp_path, config(stage=2))
    assert recorder.checkpoints == [10, 20, 30, 40]
    assert names_in(str(tmp_path / "checkpoints")) == ["step_00000040", "step_00000030"]
    folder = tmp_path / "checkpoints" / "step_00000040"
    assert sorted(path.name for path in folder.iterdir()) == ["rank_0.json", "rank_0.safetensors"]
    tensors, averaged = load_file(folder / "rank_0.safetensors"), load_file(outcome.last_weights)
    assert torch.equal(tensors["average/first.weight"], averaged["first.weight"].flatten())
    record = json.loads((folder / "rank_0.json").read_text())
    assert record["runs"]["weight/first.weight"] == {"shape": [31, 4], "start": 0, "stop": 124}
    assert (record["workers"], record["optimizer_step"], record["loop"]["step"]) == (1, 40, 40)


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file of this process grow beyond a few kilobytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_DISK_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_cannot_be_written_costs_a_message_and_nothing_else(tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "whole", config())
    disk = full_disk()

    def on_step(step: int) -> None:
        if step == 15:
            disk.__enter__()
        if step == 25:
            disk.__exit__(None, None, None)

    outcome, recorder = train(tmp_path / "full", config(), on_step)
    assert recorder.checkpoints == [10, 30, 40]
    (message,) = recorder.messages
    assert message.startswith("checkpoint step_00000020 could not be written (worker 0: OSError: [Errno 27] File too large")
    assert message.endswith("training goes on, a restart would go on from step_00000010")
    assert outcome.messages == [message]
    assert storage.read_bytes(outcome.last_weights) == storage.read_bytes(whole.last_weights)
    assert names_in(str(tmp_path / "full" / "checkpoints")) == ["step_00000040", "step_00000030"]


def test_a_remote_store_is_as_good_as_a_folder(tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "whole", config(max_steps=30))
    store = f"memory://{tmp_path.name}"
    train(tmp_path / "cut", config(max_steps=20), checkpoints=store)
    assert names_in(store) == ["step_00000020", "step_00000010"]
    storage.write_bytes(f"{store}/step_00000020/rank_0.safetensors", b"short")
    outcome, recorder = train(tmp_path / "cut", config(max_steps=30), checkpoints=store)
    assert recorder.starts == [10]
    assert recorder.messages[0].startswith("checkpoint step_00000020 is damaged (rank_0.safetensors has 5 bytes instead of ")
    assert storage.read_bytes(outcome.last_weights) == storage.read_bytes(whole.last_weights)
    assert names_in(store) == ["step_00000030", "step_00000020"]


def test_five_in_a_row_that_cannot_be_written_end_the_run_and_leave_the_last_good_one(tmp_path: Path) -> None:
    train(tmp_path, config(max_steps=10))
    with full_disk(), pytest.raises(StageError, match=r"checkpoints: got 5 in a row that could not be written to .*; fix: make room there"):
        train(tmp_path, config(max_steps=200, validate_every=100))
    assert names_in(str(tmp_path / "checkpoints")) == ["step_00000010"]
    assert train(tmp_path, config(max_steps=200, validate_every=100))[1].starts == [10]


def test_no_policy_deletes_the_knee_and_an_interruption_changes_nothing_about_it(tmp_path: Path) -> None:
    class Planted(ToyTask):
        """PSNR follows a curve with a knee, from a given validation on."""

        def __init__(self, first: int = 0) -> None:
            self.curve = iter((10.0, 20.0, 26.0, 28.0, 28.5, *(28.4 - 0.1 * i for i in range(30)))[first:])

        def validate(self, module, batch):
            return {"psnr_y": torch.full((len(batch["x"]),), next(self.curve))}

    knee = KneeConfig(metrics=("psnr_y",), stop=False, keep=16)
    settings = config(max_steps=60, validate_every=2, checkpoint_every=2, keep_checkpoints=1, knee=knee)
    whole, _ = train(tmp_path / "whole", settings, task=Planted())
    train(tmp_path / "cut", settings.model_copy(update={"max_steps": 40}), task=Planted())
    outcome, recorder = train(tmp_path / "cut", settings, task=Planted(21))
    assert recorder.starts == [40]
    assert whole.knee_step is not None
    assert outcome.history == whole.history
    assert outcome.knee_step == whole.knee_step < 40
    assert storage.read_bytes(outcome.knee_weights) == storage.read_bytes(whole.knee_weights)
    assert names_in(str(tmp_path / "cut" / "checkpoints")) == ["step_00000060"]
    assert len(storage.list_files(str(tmp_path / "cut" / "snapshots"))) == 16


def test_names_are_read_back_and_a_rollback_makes_new_ones() -> None:
    assert [parse_checkpoint_name(checkpoint_name(*one)) for one in ((120, 0), (120, 3))] == [(120, 0), (120, 3)]
    assert checkpoint_name(120, 0) == "step_00000120"


def test_other_numbers_of_workers_share_the_same_batch_in_micro_batches_no_larger() -> None:
    settings = config(batch_size=24, workers=3, accumulation=2)
    split = {workers: settings.on_workers(workers) for workers in (1, 2, 3, 4, 6, 8, 12)}
    assert all(one.workers * one.accumulation * one.micro_batch_size == 24 for one in split.values())
    assert {workers: (one.accumulation, one.micro_batch_size) for workers, one in split.items()} == {
        1: (6, 4),
        2: (3, 4),
        3: (2, 4),
        4: (2, 3),
        6: (1, 4),
        8: (1, 3),
        12: (1, 2),
    }
    with pytest.raises(UserError, match=r"train.batch_size: got 24 for 5 workers; expected a multiple of them"):
        settings.on_workers(5)
    assert settings.decisive() == settings.on_workers(8).model_copy(update={"zero": ZeroConfig(stage=3), "max_failures": 9}).decisive()
    assert settings.decisive() != settings.model_copy(update={"batch_size": 48}).decisive()
