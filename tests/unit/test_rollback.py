"""When training goes wrong: the loop goes back, leaves out what did harm, also after a restart, and ends where that does not help."""

import sys
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from toy_loop import ToyBatches, ToyTask, config, outcome_as_read, train_toy, written

from linearsr.guard import GuardConfig
from linearsr_platform import storage
from linearsr_platform.train.engine import DeepSpeedEngine
from linearsr_platform.train.recovery import TrainingDiverged


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the loop on a fresh engine; returns the outcome and what was reported."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    return partial(train_toy, tmp_path)


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

    assert engine.optimizer_step() is None
    fresh = engine.capture()
    first = losses()
    assert engine.optimizer_step() == len(batches)
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


def test_a_resumed_run_leaves_out_the_data_that_it_had_learned_to_leave_out(train) -> None:
    class Bad(ToyBatches):
        """The same broken photograph, met twice."""

        def __next__(self) -> dict[str, Tensor]:
            batch = super().__next__()
            return {**batch, "y": batch["y"] * 300} if self.number in (70, 150) else batch

    settings = config(max_steps=140, lr=0.005, clip_norm=1000.0, validate_every=20, checkpoint_every=20, log_every=5)
    whole, before = train(settings, "whole", batches=Bad(8))
    (trip,) = before.trips
    assert trip.bad_data
    newest = sorted(before.folder.glob("step_00000100*"))[-1]
    resumed, after = train(settings, "resumed", resume=newest, batches=Bad(8))
    assert after.starts == [100]
    assert not after.trips
    assert resumed.history == whole.history
    assert storage.read_bytes(resumed.last_weights) == storage.read_bytes(whole.last_weights)


def test_a_run_resumed_with_a_strike_can_still_go_back(train) -> None:
    class Bad(ToyBatches):
        """A loss over its limit right before the checkpoint, one far over it right after."""

        def __next__(self) -> dict[str, Tensor]:
            batch = super().__next__()
            return {**batch, "y": batch["y"] * {78: 3, 83: 300}.get(self.number, 1)}

    settings = {"lr": 0.005, "clip_norm": 1000.0, "checkpoint_every": 20, "log_every": 5}
    _, before = train(config(max_steps=80, **settings), "before", batches=Bad(8))
    strikes = storage.read_json(str(before.folder / "step_00000080" / "rank_0.json"))["loop"]["guard"]["strikes"]
    assert [step for step, _ in strikes["loss"]] == [78]
    _, after = train(config(max_steps=90, **settings), "after", resume=before.folder / "step_00000080", batches=Bad(8))
    assert [trip.rolled_back_to for trip in after.trips] == [80]


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
