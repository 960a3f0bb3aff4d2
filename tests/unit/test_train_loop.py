"""The loop on a toy network with the real engine: it learns, stops, resumes exactly, and keeps the right weights."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice, pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from linearsr.guard import GuardConfig, Trip
from linearsr_platform import storage
from linearsr_platform.errors import StageError
from linearsr_platform.recipe.train_schema import KneeConfig, TrainConfig, ValidationConfig, ZeroConfig
from linearsr_platform.train.deepspeed_config import deepspeed_config
from linearsr_platform.train.engine import DeepSpeedEngine
from linearsr_platform.train.job import TrainJob
from linearsr_platform.train.loop import run_training
from linearsr_platform.train.outcome import TrainOutcome
from linearsr_platform.train.processes import join_group
from linearsr_platform.train.recovery import TrainingDiverged
from linearsr_platform.train.schedule import learning_rate
from linearsr_platform.train.snapshots import Snapshots

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
    defaults = {"max_steps": 12, "batch_size": 8, "lr": 0.02, "clip_norm": 1.0, "ema_decay": 0.9, "log_every": 2}
    every = {"validate_every": 4, "checkpoint_every": 5, "keep_checkpoints": 100}
    knee = knee or KneeConfig(metrics=("psnr_y", "gmsd"))
    return TrainConfig(**{**defaults, **every, "zero": ZeroConfig(stage=stage), "knee": knee, **settings})


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the loop on a fresh engine; returns the outcome and what was reported."""
    monkeypatch.setenv("LOCAL_RANK", "0")

    def run(train: TrainConfig, name: str, *, task: ToyTask | None = None, resume=None, init=None, poison=None, batches=None, clock=None):
        recorder = Recorder(tmp_path / name / "checkpoints")
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
            output_url=str(tmp_path / name),
        )
        engine = DeepSpeedEngine(task or ToyTask(), train, seed=1, init_weights=init)
        validation = [{"x": HELD_BACK, "y": HELD_BACK @ TRUTH.T}]
        batches = batches or ToyBatches(train.micro_batch_size, poison)
        timing = {} if clock is None else {"clock": clock}
        try:
            return run_training(engine, batches, validation, job, recorder, checkpoints=str(recorder.folder), **timing), recorder
        finally:
            engine.close()

    return run


def written(folder: Path) -> TrainOutcome:
    return TrainOutcome.from_json(storage.read_json(str(folder / "outcome.json")))


def outcome_as_read(outcome: TrainOutcome) -> TrainOutcome:
    """Return the outcome after its way through JSON, where tuples are lists."""
    return TrainOutcome.from_json(json.loads(json.dumps(outcome.to_json())))


def test_rate_warms_up_to_the_peak_and_falls_to_zero() -> None:
    rates = [learning_rate(step, config(lr=1.0, warmup_steps=4, schedule="cosine", max_steps=20)) for step in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[12] == pytest.approx(0.5)
    assert rates[20] == pytest.approx(0.0)
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))
    assert learning_rate(10**6, config(lr=0.3)) == 0.3


def test_extra_deepspeed_settings_lie_under_the_recipe() -> None:
    extra = {"zero_optimization": {"stage": 3, "overlap_comm": True}, "gradient_clipping": 9.0, "wall_clock_breakdown": True}
    merged = deepspeed_config(config(clip_norm=0.5).model_copy(update={"zero": ZeroConfig(stage=2, extra=extra)}), 1000)
    assert merged["zero_optimization"] == {"reduce_bucket_size": 1000, "stage": 2, "overlap_comm": True}
    assert (merged["gradient_clipping"], merged["wall_clock_breakdown"]) == (0.5, True)


@pytest.mark.parametrize(("stage", "precision"), [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (2, "bfloat16")])
def test_resumed_run_equals_the_uninterrupted_one_to_the_bit(train, stage: int, precision: str) -> None:
    settings = config(stage=stage, precision=precision, accumulation=2, warmup_steps=3, schedule="cosine")
    whole, before = train(settings, "whole")
    assert before.checkpoints == [5, 10, 12]
    resumed, after = train(settings, "resumed", resume=before.folder / "step_00000005")
    timeless = {"samples_per_s", "seconds"}
    for step in (8, 12):
        assert {k: v for k, v in after.metrics[step].items() if k not in timeless} == {
            k: v for k, v in before.metrics[step].items() if k not in timeless
        }
    assert resumed.history == whole.history
    assert storage.read_bytes(resumed.last_weights) == storage.read_bytes(whole.last_weights)
    assert whole.history[-1]["gmsd"] < whole.history[0]["gmsd"]


def test_stages_and_accumulation_train_the_same_network(train) -> None:
    plain = train(config(stage=0), "plain")[0]
    for name, settings in {"stage-2": config(stage=2), "stage-3": config(stage=3)}.items():
        assert [point["gmsd"] for point in train(settings, name)[0].history] == pytest.approx(
            [point["gmsd"] for point in plain.history], rel=1e-4
        )


def test_training_stops_at_a_confirmed_knee_and_hands_on_its_weights(train, tmp_path: Path) -> None:
    curve = (10.0, 20.0, 26.0, 28.0, 28.5, *(28.4 - 0.1 * i for i in range(30)))
    knee = KneeConfig(metrics=("psnr_y",))
    outcome, recorder = train(config(max_steps=60, validate_every=2, knee=knee), "knee", task=ToyTask(curve))
    assert outcome.stopped_by == "knee"
    assert outcome.steps < 60
    assert outcome.knee_step is not None
    assert 2 <= outcome.knee_step < outcome.steps
    assert outcome.knee_weights == str(tmp_path / "knee" / "snapshots" / f"step_{outcome.knee_step:08d}.safetensors")
    assert storage.exists(outcome.knee_weights)
    assert recorder.validations == list(range(0, outcome.steps + 1, 2))
    assert recorder.checkpoints[-1] == outcome.steps
    assert written(tmp_path / "knee") == outcome_as_read(outcome)

    only_recorded, _ = train(
        config(max_steps=60, validate_every=2, knee=knee.model_copy(update={"stop": False})), "on", task=ToyTask(curve)
    )
    assert (only_recorded.stopped_by, only_recorded.steps) == ("max_steps", 60)
    assert only_recorded.knee_step == outcome.knee_step


def test_snapshots_stay_where_the_knee_may_be(tmp_path: Path) -> None:
    join_group()
    snapshots = Snapshots(str(tmp_path), 4, last_step=None)

    def kept() -> list[int]:
        return [int(storage.name_of(file)[5:13]) for file in storage.list_files(str(tmp_path))]

    for step in range(0, 200, 10):
        snapshots.write(step, {"weight": torch.ones(1)})
        snapshots.prune([40, step] if step >= 40 else [step])
    first, *between, last = kept()
    assert (40 in (first, *between), last) == (True, 190)
    assert max(later - earlier for earlier, later in pairwise(kept())) <= 80
    # Candidates go last, and among them the least likely first.
    snapshots.write(200, {"weight": torch.ones(1)})
    snapshots.prune([40, 200, 190, *between])
    assert {40, 190, 200} <= set(kept())
    assert snapshots.nearest(42) == 40
    earlier = kept()[1]
    assert Snapshots(str(tmp_path), 4, last_step=earlier).nearest(190) == earlier


def test_number_of_snapshots_is_bounded(train, tmp_path: Path) -> None:
    knee = KneeConfig(metrics=("psnr_y",), keep=3)
    outcome, _ = train(config(max_steps=10, validate_every=1, knee=knee), "bounded")
    assert len(storage.list_files(str(tmp_path / "bounded" / "snapshots"))) == 3
    assert storage.exists(outcome.knee_weights)
    assert storage.exists(outcome.last_weights)


def test_finished_run_resumed_gives_its_outcome_again(train) -> None:
    settings = config()
    outcome, recorder = train(settings, "done")
    again, silent = train(settings, "done", resume=recorder.folder / "step_00000012")
    assert (silent.metrics, silent.validations, silent.checkpoints) == ({}, [], [])
    assert (again.steps, again.knee_weights, again.history) == (outcome.steps, outcome.knee_weights, outcome.history)


def test_seconds_end_a_run_and_earlier_attempts_count(train) -> None:
    ticks = count()
    settings = config(max_steps=1000, max_seconds=40.0, validate_every=1000)
    outcome, _ = train(settings, "slow", clock=lambda: float(next(ticks)))
    assert outcome.stopped_by == "max_seconds"
    assert 0 < outcome.steps < 1000
    assert outcome.history[-1]["step"] == outcome.steps
    again, silent = train(settings, "slow", clock=lambda: float(next(ticks)))
    assert (again.steps, silent.metrics) == (outcome.steps, {})


def test_divergence_names_the_step_and_leaves_no_checkpoint_of_it(train, tmp_path: Path) -> None:
    unguarded = config(checkpoint_every=2, log_every=50, guard=GuardConfig(enabled=False))
    with pytest.raises(TrainingDiverged, match=r"train step 4: got loss nan; expected a finite number; fix: lower train\.lr"):
        train(unguarded, "diverged", poison=4)
    assert [path.name for path in (tmp_path / "diverged" / "checkpoints").iterdir()] == ["step_00000002"]
    assert not (tmp_path / "diverged" / "outcome.json").exists()


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (0, "bfloat16"), (2, "bfloat16")]
)
def test_captured_state_comes_back_to_the_bit(monkeypatch, stage: int, precision: str) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    engine = DeepSpeedEngine(ToyTask(), config(stage=stage, precision=precision), seed=1)
    batches, generator = list(islice(ToyBatches(8), 6)), engine.generator.get_state()

    def losses() -> list[float]:
        engine.generator.set_state(generator)
        return [engine.train_step([batch], 0.05).loss.item() for batch in batches]

    fresh = engine.capture()
    first = losses()
    later = engine.capture()
    second = losses()
    engine.restore(fresh)
    assert losses() == first
    engine.restore(later)
    assert losses() == second
    engine.train_step([{**batches[0], "y": batches[0]["y"] * float("nan")}], 0.05)
    engine.restore(later)
    assert losses() == second
    assert second != first
    assert engine.capture(later) is later
    third = losses()
    engine.restore(later)
    assert losses() == third
    assert third not in (first, second)
    engine.close()


def test_a_nan_takes_training_back_and_it_goes_on_with_other_data(train, tmp_path: Path) -> None:
    settings = config(max_steps=40, checkpoint_every=20, validate_every=10, log_every=5)
    outcome, recorder = train(settings, "poisoned", poison=27)
    (trip,) = recorder.trips
    assert (trip.step, trip.detected_at, trip.statistic, trip.value) == (27, 30, "loss", "nan")
    assert (trip.action, trip.rolled_back_to, trip.lr_scale, trip.number) == ("rolled back", 20, 0.5, 1)
    assert trip.layer is not None
    assert outcome.trips == [trip.to_json()]
    assert [point["step"] for point in outcome.history] == [0, 10, 20, 30, 40]
    assert recorder.checkpoints == [20, 20, 40]
    assert recorder.metrics[25]["lr"] == pytest.approx((0.5 + 0.5 * 4 / 50) * 0.02)
    assert outcome.history[-1]["gmsd"] < outcome.history[2]["gmsd"]
    assert written(tmp_path / "poisoned") == outcome_as_read(outcome)
    resumed, after = train(settings, "poisoned-on", resume=recorder.folder / "step_00000020-1")
    assert resumed.trips == outcome.trips
    assert after.metrics[25] == recorder.metrics[25] | {name: after.metrics[25][name] for name in ("samples_per_s", "seconds")}
    assert storage.read_bytes(resumed.last_weights) == storage.read_bytes(outcome.last_weights)


def test_snapshots_of_undone_steps_go(train, tmp_path: Path) -> None:
    settings = config(max_steps=40, checkpoint_every=20, validate_every=5, log_every=5)
    train(settings, "undone", poison=38)
    files = storage.list_files(str(tmp_path / "undone" / "snapshots"))
    assert [int(storage.name_of(file)[5:13]) for file in files] == list(range(0, 41, 5))


def test_a_fault_that_stays_ends_training_and_names_the_layer(train, tmp_path: Path) -> None:
    class Broken(ToyTask):
        def loss(self, module, batch, generator):
            if batch["number"][0] > 25:
                module[2].weight.register_hook(lambda gradient: gradient * float("nan"))
            return super().loss(module, batch, generator)

    class Numbered(ToyBatches):
        def __next__(self):
            batch = super().__next__()
            return {**batch, "number": torch.full((self.size,), self.number)}

    monkeypatched = config(max_steps=60, checkpoint_every=20, log_every=5, guard=GuardConfig(max_rollbacks=2))
    with pytest.raises(
        TrainingDiverged, match=r"trip 3 of the guard in a row; .*at most 2 rollbacks .*first seen bad: gradient of 2\.weight on worker 0"
    ):
        train(monkeypatched, "lasting", task=Broken(), batches=Numbered(8))
    assert not (tmp_path / "lasting" / "outcome.json").exists()


def test_a_metric_that_is_not_finite_takes_training_back(train) -> None:
    curve = iter((10.0, 11.0, 12.0, float("inf"), *(13.0 + i for i in range(30))))
    outcome, recorder = train(config(max_steps=12, validate_every=4, checkpoint_every=4), "metric", task=ToyTask(tuple(curve)))
    (trip,) = recorder.trips
    assert (trip.step, trip.statistic, trip.rolled_back_to) == (12, "validation psnr_y", 0)
    assert [point["psnr_y"] for point in outcome.history] == [10.0, 13.0, 14.0, 15.0]


def test_next_stage_starts_from_the_weights_it_is_given(train, tmp_path: Path) -> None:
    first, _ = train(config(), "first")
    second, _ = train(config(max_steps=1, lr=1e-9), "second", init=first.last_weights)
    assert second.history[0]["gmsd"] == pytest.approx(first.history[-1]["gmsd"], rel=1e-6)
    storage.write_bytes(str(tmp_path / "other.safetensors"), storage.read_bytes(first.knee_weights).replace(b"0.weight", b"9.weight"))
    with pytest.raises(StageError, match=r"other\.safetensors; expected the weights of this network"):
        train(config(), "third", init=str(tmp_path / "other.safetensors"))


def test_checkpoint_of_another_codec_is_refused(train) -> None:
    _, recorder = train(config(max_steps=1), "one")
    document = recorder.folder / "step_00000001" / "rank_0.json"
    document.write_text(document.read_text().replace('"codec": null', '"codec": "ab"'))
    with pytest.raises(StageError, match="got codec ab; expected None; fix: name the codec"):
        train(config(), "two", resume=recorder.folder / "step_00000001")


@pytest.mark.parametrize("task", ["linearsr.config", "linearsr.config:Missing"])
def test_task_that_cannot_be_found_is_named(task: str) -> None:
    job = TrainJob(
        name="pretrain",
        task=task,
        task_config=None,
        train=config(),
        validation=ValidationConfig(),
        train_shards=(),
        validation_shards=(),
        output_url="unused",
    )
    with pytest.raises(ValueError, match=rf"job pretrain: task: got '{task}'"):
        job.build_task()
