"""The loop on a toy network with the real engine: it learns, stops, resumes exactly, and keeps the right weights."""

import sys
from functools import partial
from itertools import count, pairwise
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from toy_loop import ToyTask, config, outcome_as_read, train_toy, written

from linearsr.guard import GuardConfig
from linearsr_platform import storage
from linearsr_platform.errors import StageError
from linearsr_platform.recipe.train_schema import KneeConfig, ValidationConfig, ZeroConfig
from linearsr_platform.train import sharding
from linearsr_platform.train.deepspeed_config import deepspeed_config
from linearsr_platform.train.engine import DeepSpeedEngine
from linearsr_platform.train.job import TrainJob
from linearsr_platform.train.processes import join_group
from linearsr_platform.train.recovery import TrainingDiverged
from linearsr_platform.train.schedule import learning_rate
from linearsr_platform.train.snapshots import Snapshots


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the loop on a fresh engine; returns the outcome and what was reported."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    return partial(train_toy, tmp_path)


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


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_only_worker_0_copies_whole_weights_to_host_memory(monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    engine = DeepSpeedEngine(ToyTask(), config(stage=stage), seed=1)
    copied: list[int] = []
    monkeypatch.setattr(sharding, "_to_host", lambda value: copied.append(value.numel()) or value.clone())
    first = engine.full_weights()
    assert sum(copied) == sum(weight.numel() for weight in first.values()) == 3 * 16 + 16 + 16 + 1
    monkeypatch.setattr("linearsr_platform.train.engine.rank", lambda: 1)
    assert engine.full_weights() == {}
    assert len(copied) == len(first)
    engine.close()


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
