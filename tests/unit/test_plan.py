"""What a run takes, as arithmetic: memory by ZeRO stage, room, and why some runs can never be."""

import json
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from autoencoders import write_autoencoder

from linearsr.backbone import Backbone
from linearsr.codec_memory import CodecMemory
from linearsr_platform.cli.app import app
from linearsr_platform.cluster.capacity import CLAMPED, Room, Share, workers_and_share
from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.recipe.schema import MachineConfig
from linearsr_platform.stages.activations import network_size, training_size, worker_bytes
from linearsr_platform.stages.context import StageResult
from linearsr_platform.stages.pace import Pace, paces, train_seconds
from linearsr_platform.stages.plan import plan_run
from linearsr_platform.train.footprint import checkpoint_bytes, footprint, snapshot_bytes

PIPELINES = Path(__file__).parents[2] / "pipelines"
GPUS = ("cluster.gpus_per_worker=1", "cluster.num_gpus=8")
FOLDER = str(PIPELINES)
QUICKSTART = str(PIPELINES / "quickstart.yaml")


def recipe(*overrides: str):
    return load_recipe(QUICKSTART, None, overrides).recipe


@pytest.mark.parametrize(("precision", "dtype"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_shares_out_what_its_stage_says(stage: int, precision: str, dtype: int) -> None:
    """ZeRO, section 3.1: of 16 bytes a parameter in mixed precision stage 1 shares 12, stage 2 two more, stage 3 all."""
    settings = [f"pretrain.zero.stage={stage}", f"pretrain.precision={precision}", "pretrain.workers=4", "pretrain.batch_size=8"]
    memory = footprint(recipe(*settings).pretrain, parameters=1000, activation_bytes=7)
    shares = [4 if stage >= least else 1 for least in (1, 2, 3)]
    masters = 4000 if dtype == 2 or stage > 0 else 0
    assert memory.optimizer == (8000 + masters) / shares[0]
    assert memory.average == 4000 / shares[0]
    assert memory.gradients == 1000 * dtype / shares[1]
    assert memory.weights == 1000 * dtype / shares[2]
    assert memory.activations == 7
    assert memory.restore_points == 2 * memory.checkpoint_copy == 32000 / shares[0]
    on_gpu = footprint(recipe(*settings).pretrain, parameters=1000, activation_bytes=7, gpu=True)
    assert on_gpu.checkpoint_copy == 2**14 / shares[0]
    assert (memory.saving, on_gpu.saving) == (12000 - memory.gradients - 7, 12000)
    # Gradients of this worker in one piece, of halves in float32 too; the bucket, no larger than the network; and what is gathered.
    pieces, passing = (4 if dtype == 4 else 6) * 1000 / shares[0], (2 if stage == 3 else 1) * 1000 * dtype
    assert memory.step == on_gpu.step == pieces + passing - 7
    assert on_gpu.device_bytes(gpu=True) - on_gpu.step == sum((on_gpu.weights, on_gpu.gradients, on_gpu.optimizer, on_gpu.average, 7, 1e9))
    # On a CPU it is not there while worker 0 saves, and the others have no more than it.
    assert memory.host_bytes(gpu=False) == memory.model - memory.step + max(memory.step, memory.saving) + on_gpu.fixed + 48000 / shares[0]
    assert memory.reserved_bytes(10**6, gpu=False) == pytest.approx(memory.model + memory.fixed + 48000 / shares[0], abs=600)


def test_activations_are_those_of_a_real_forward() -> None:
    loaded = recipe()
    model, train, shape = loaded.model, loaded.pretrain, loaded.model.resolved_backbone
    network = Backbone(shape, latent_channels=48, lr_pixels_per_token=1, num_tags=100)
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = tensor
        return tensor

    side, count = train.crop_px // model.codec.factor, train.micro_batch_size
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        low, captions = torch.randn(count, 3, side, side), torch.ones(count, model.max_tags, dtype=torch.int64)
        network(torch.randn(count, 48, side, side), torch.rand(count), network.prepare(low, captions))
    held = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    size = network_size(model, train)
    assert size.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert size.activation_bytes == pytest.approx(held, rel=0.05)


def test_the_paper_recipe_needs_what_its_comments_say() -> None:
    loaded = load_recipe(str(PIPELINES / "linearsr_x4.yaml")).recipe
    size = network_size(loaded.model, loaded.pretrain)
    assert size.parameters == pytest.approx(1.605e9, rel=0.001)
    memory = footprint(loaded.pretrain, parameters=size.parameters, activation_bytes=size.activation_bytes)
    assert memory.model > 20e9


@pytest.mark.parametrize(
    ("overrides", "machines", "said"),
    [
        ((), [MachineConfig(cpus=1)], "pretrain: 2 workers of 1 CPUs each, but the machines (1 x 1 CPUs) have room for 1"),
        (
            ("cluster.gpus_per_worker=1", "cluster.num_gpus=8"),
            [MachineConfig(cpus=8, gpus=8, gpu_memory_gb=0.5)],
            "a worker takes 1.0 GB of a GPU with 0.5 GB",
        ),
        ((), [MachineConfig(cpus=8, memory_gb=2.5)], "2 workers of 1.4 GB of memory each, but the machines (1 x 2.5 GB) have room for 1"),
        ((), [MachineConfig(cpus=1, count=9, memory_gb=1)], "GB of memory each, but the machines (9 x 1 GB) have room for 0"),
        ((), [MachineConfig(cpus=1, memory_gb=64), MachineConfig(cpus=1, memory_gb=1)], "(1 x 64 GB, 1 x 1 GB) have room for 1"),
        (("pretrain.workers=64", "pretrain.batch_size=64"), [MachineConfig(cpus=64)], "photographs for 64 workers"),
    ],
)
def test_what_can_never_run_is_said_with_the_arithmetic(overrides: tuple[str, ...], machines: list[MachineConfig], said: str) -> None:
    problems = plan_run(recipe(*overrides), machines, {}, folder=FOLDER).problems
    assert any(said in problem for problem in problems), problems


def test_disk_holds_the_checkpoints_that_are_kept_and_the_one_being_written_as_far_as_there_are_so_many() -> None:
    steps = ("pretrain.max_steps=100", "pretrain.validate_every=50", "pretrain.checkpoint_every=25")
    kept = [recipe(*steps, f"pretrain.keep_checkpoints={count}").pretrain for count in (2, 3, 70)]
    assert [checkpoint_bytes(one, parameters=1000) for one in kept] == [3 * 16000, 4 * 16000, 5 * 16000]
    assert snapshot_bytes(kept[0], parameters=1000) == 4 * 4000


def test_disk_of_a_run_is_the_most_at_any_time() -> None:
    plan = plan_run(recipe("experts.cpus_per_worker=1"), [MachineConfig(cpus=2)], {}, folder=FOLDER)
    pretrain, experts, finetune = plan.training
    kept = pretrain.snapshot_bytes + 4 * experts.snapshot_bytes + 4 * finetune.snapshot_bytes
    assert (experts.at_once, finetune.at_once) == (2, 2)
    assert plan.disk_bytes == kept + 2 * finetune.checkpoint_bytes
    without = replace(plan, training=tuple(replace(stage, checkpoint_bytes=0.0) for stage in plan.training))
    assert without.disk_bytes == kept + 2 * 4 * 4 * finetune.parameters


def test_time_is_that_of_steps_and_validations_within_the_budget() -> None:
    train = recipe("pretrain.max_steps=100", "pretrain.validate_every=50", "pretrain.batch_size=8", "pretrain.max_seconds=null").pretrain
    pace = Pace(samples_per_s=40.0, validation_s=2.0, source="given")
    assert train_seconds(train, pace) == 100 * 8 / 40 + 3 * 2
    assert train_seconds(recipe("pretrain.max_seconds=10").pretrain, pace) == 10
    assert train_seconds(train, Pace(samples_per_s=None, source="")) is None


def test_an_elastic_trainer_is_planned_on_the_workers_that_have_room() -> None:
    elastic = recipe("pretrain.workers=4", "pretrain.batch_size=12", "pretrain.min_workers=1", "cluster.num_cpus=1")
    workers = {}
    for cpus in (1, 2, 9):
        plan = plan_run(elastic, [MachineConfig(cpus=cpus)], {}, folder=FOLDER)
        assert not plan.problems
        assert plan.training[0].crops == 3
        workers[cpus] = plan.training[0].workers
    assert workers == {1: 1, 2: 2, 9: 4}


def test_an_elastic_trainer_has_as_many_workers_as_find_room_with_what_each_then_takes() -> None:
    network = "model.backbone={width: 768, num_blocks: 12, caption_width: 32, num_cross_heads: 12}"
    elastic = recipe(network, "pretrain.workers=4", "pretrain.batch_size=12", "pretrain.min_workers=1", "pretrain.zero.stage=2")
    takes = worker_bytes(elastic, elastic.pretrain)
    assert list(takes) == [1, 2, 3, 4]
    assert list(takes.values()) == sorted(takes.values(), reverse=True)
    found = {}
    for memory in (4 * takes[4], 4 * takes[4] - 1e6, 2 * takes[2], takes[1], 0.5 * takes[1]):
        plan = plan_run(elastic, [MachineConfig(cpus=4, memory_gb=memory / 1e9 + 1e-6)], {}, folder=FOLDER)
        stage = plan.training[0]
        found[stage.workers, stage.share.memory_bytes] = [problem for problem in plan.problems if problem.startswith("pretrain")]
        # What a run finds too, which knows its machines only then.
        room = Room(nodes=(Share(cpus=4, memory_bytes=memory + 1e3),))
        assert workers_and_share({count: Share(cpus=1, memory_bytes=each) for count, each in takes.items()}, room)[0] == stage.workers
    enough = {(workers, takes[workers]): [] for workers in (4, 3, 2, 1)}
    assert found.items() >= enough.items()
    (last,) = found.keys() - enough.keys()
    assert last == (1, pytest.approx(CLAMPED * 0.5 * takes[1], rel=1e-3))
    assert "1 workers of" in found[last][0]
    # On a cluster that grows from nothing nobody knows what it will have: all of them.
    assert workers_and_share({1: Share(cpus=1, memory_bytes=9e9), 4: Share(cpus=1, memory_bytes=3e9)}, Room(nodes=(Share(cpus=0),))) == (
        4,
        Share(cpus=1, memory_bytes=3e9),
    )


def test_experts_queue_where_not_all_have_room() -> None:
    known = {"experts": Pace(samples_per_s=100.0, source="given")}
    plans = [plan_run(recipe("experts.cpus_per_worker=1"), [MachineConfig(cpus=cpus)], known, folder=FOLDER) for cpus in (2, 4)]
    one, four = (plan.training[1] for plan in plans)
    assert (one.at_once, four.at_once) == (2, 4)
    assert one.seconds is not None
    assert four.seconds is not None
    assert one.seconds > 1.8 * four.seconds


@pytest.mark.parametrize(
    ("overrides", "memory_gb", "trials"),
    [
        (("experts.cpus_per_worker=0.25",), None, 4),
        (("experts.cpus_per_worker=0.25", "search.max_concurrent=3"), None, 3),
        ((), 3.4, 2),
        (("cluster.cpus_per_worker=5",), None, 0),
    ],
)
def test_trials_at_once_are_those_of_the_search(overrides: tuple[str, ...], memory_gb: float | None, trials: int) -> None:
    search = load_recipe(str(PIPELINES / "search_boundaries.yaml"), None, ["cluster.cpus_per_worker=1", *overrides]).recipe
    planned = plan_run(search, [MachineConfig(cpus=4, memory_gb=memory_gb)], {}, folder=FOLDER)
    assert planned.trials_at_once == trials
    assert any("no room for a trial" in problem for problem in planned.problems) == (trials == 0)


def test_models_that_work_on_photographs_are_planned_where_they_take_long_or_gpus() -> None:
    def planned(machine: MachineConfig, *overrides: str):
        return plan_run(recipe(*overrides), [machine], {}, folder=FOLDER)

    with_gpu, without = MachineConfig(cpus=8, gpus=2, memory_gb=64), MachineConfig(cpus=8, memory_gb=64)
    assert planned(without).on_pictures == ()
    (evaluate,) = planned(with_gpu, "cluster.num_gpus=2", "cluster.gpus_per_picture_worker=0.5").on_pictures
    assert (evaluate.stage, evaluate.at_once, evaluate.share.cpus, evaluate.share.gpus) == ("evaluate", 4, 1, 0.5)
    none = planned(without, "cluster.num_gpus=2", "cluster.gpus_per_picture_worker=0.5")
    assert any(re.match(r"evaluate: a worker takes 1 CPUs, 0\.5 GPUs and .* have room for none", problem) for problem in none.problems)
    paper = load_recipe(str(PIPELINES / "linearsr_x4.yaml"), None, ["data.sources={few: package://skimage/data}"]).recipe
    whole = plan_run(paper, [without], {}, folder=FOLDER)
    assert [one.stage for one in whole.on_pictures] == ["evaluate"]
    # 14 GB hold all experts of 1.6 G parameters; a machine of 6 GB has room for one.
    assert (whole.on_pictures[0].at_once, whole.encoder_counted) == (4, False)
    (small,) = plan_run(paper, [MachineConfig(cpus=8, memory_gb=6)], {}, folder=FOLDER).on_pictures
    assert small.share.memory_bytes < 6e9


def test_photographs_are_those_that_table_and_limit_leave() -> None:
    limits = ((), ("data.sources.skimage.limit=3",))
    counts = [plan_run(recipe(*limit), [MachineConfig(cpus=2)], {}, folder=FOLDER).pictures for limit in limits]
    assert counts == [10, 5]


def test_a_pace_is_that_of_the_stage_that_ended_last(tmp_path: Path) -> None:
    for stage, key, seconds, age_s in (("evaluate", "ffff", 999.0, 100), ("evaluate", "0000", 10.0, 0), ("trials", "1111", 1500.0, 0)):
        url = tmp_path / "quickstart" / f"{stage}-{key}"
        StageResult(stage=stage, key=key, url=str(url), summary="", seconds=seconds, run_id="r", data={}).write()
        changed = time.time() - age_s
        os.utime(url / "result.json", (changed, changed))
    found = paces(recipe(f"storage={tmp_path}"), {})
    assert {stage: pace.stage_s for stage, pace in found.items()} == {"evaluate": 10.0}


def test_the_command_prints_json_and_refuses_wrong_rates(tmp_path: Path) -> None:
    storage = f"storage={tmp_path}"
    done = CliRunner().invoke(app, ["plan", QUICKSTART, "--set", storage, "--set", "cluster.machines=[{cpus: 4}]", "--json"])
    assert done.exit_code == 0, done.output
    assert [stage["stage"] for stage in json.loads(done.stdout)["training"]] == ["pretrain", "experts", "finetune"]
    wrong = CliRunner().invoke(app, ["plan", QUICKSTART, "--rate", "pretrian=3"])
    assert wrong.exit_code == 2
    unset = CliRunner().invoke(app, ["plan", QUICKSTART, "--set", "cluster.secrets.AWS_SECRET_ACCESS_KEY=env:LINEARSR_IS_NOT_SET"])
    assert (unset.exit_code, "cluster.secrets.AWS_SECRET_ACCESS_KEY: got 'env:LINEARSR_IS_NOT_SET'" in unset.output) == (2, True)
    full = CliRunner().invoke(app, ["plan", QUICKSTART, "--set", storage, "--set", "cluster.object_store_mb=99000000"])
    assert (full.exit_code, "cluster.object_store_mb: got 103809.0 GB; expected less" in full.output) == (2, True)
    impossible = CliRunner().invoke(app, ["plan", QUICKSTART, "--set", storage, "--set", "cluster.machines=[{cpus: 1}]"])
    assert impossible.exit_code == 1


@pytest.mark.parametrize("missing", ["secret", "bucket"])
def test_a_plan_is_made_before_there_are_secrets_and_a_bucket(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, pattern: str = "*") -> list[str]:
        raise PermissionError("no credentials")

    monkeypatch.setattr("linearsr_platform.storage.list_files", refuse)
    secret = ["--set", "cluster.secrets.AWS_SECRET_ACCESS_KEY=env:LINEARSR_IS_NOT_SET"] if missing == "secret" else []
    settings = ["--set", "storage=s3://not-yet/runs", "--set", "cluster.machines=[{cpus: 4}]", "--rate", "experts=9", "--json", *secret]
    done = CliRunner().invoke(app, ["plan", QUICKSTART, *settings])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["training"][1]["source"] == "given"
    assert "earlier runs under s3://not-yet/runs were not looked at: " in done.stderr


def test_memory_is_kept_for_workers_and_is_by_itself_no_reason_never_to_start() -> None:
    room = Room(nodes=(Share(cpus=4, memory_bytes=64e9), Share(cpus=4, memory_bytes=16e9)))
    cases = {(10, 1): 10, (10, 5): 10, (10, 7): 16 / 3, (10, 8): 4, (40, 2): 32, (100, 1): 64, (100, 5): 64 / 4, (100, 9): 4}
    for (wanted_gb, workers), gigabytes in cases.items():
        share = room.attainable(Share(cpus=1, memory_bytes=wanted_gb * 1e9), workers)
        part = 1.0 if gigabytes == wanted_gb else CLAMPED
        assert share.memory_bytes == pytest.approx(part * gigabytes * 1e9), (wanted_gb, workers)
        assert room.workers(share) >= min(workers, 8)
    assert str(Share(cpus=1, gpus=2, memory_bytes=3e9)) == "1 CPUs, 2 GPUs and 3 GB of memory"
    assert Share(cpus=1, memory_bytes=2.7).resources == {"CPU": 1, "memory": 2}
    assert Share(cpus=1).resources == {"CPU": 1}


def test_fewer_experts_run_at_once_where_there_is_memory_for_no_more_and_the_recipe_may_say_how_much_to_keep() -> None:
    large = ("experts.cpus_per_worker=1", "model.backbone={width: 768, num_blocks: 12, caption_width: 32, num_cross_heads: 12}")
    each = plan_run(recipe(*large), [MachineConfig(cpus=4)], {}, folder=FOLDER).training[1].share.memory_bytes
    assert each > 5e9
    for machine_gb, own, at_once in (
        (3.5 * each / 1e9, "null", 3),
        (3.5 * each / 1e9, "0", 4),
        (4.5 * each / 1e9, "null", 4),
        (64, "30", 2),
    ):
        overrides = (*large, f"cluster.memory_gb_per_worker={own}", "pretrain.workers=1")
        plan = plan_run(recipe(*overrides), [MachineConfig(cpus=4, memory_gb=machine_gb)], {}, folder=FOLDER)
        assert (plan.training[1].at_once, plan.problems) == (at_once, ())


def test_a_job_asks_for_the_memory_that_is_planned() -> None:
    loaded = recipe()
    planned = plan_run(loaded, [MachineConfig(cpus=4)], {}, folder=FOLDER)
    trains = (loaded.pretrain, loaded.experts.train, loaded.finetune.train)
    assert [stage.share.memory_bytes for stage in planned.training] == [worker_bytes(loaded, train)[train.workers] for train in trains]
    assert all(1e9 < stage.share.memory_bytes < 2e9 for stage in planned.training)


def test_a_dc_ae_is_counted_with_the_larger_of_what_it_codes(tmp_path: Path) -> None:
    codec = f"model.codec={{kind: dc-ae, factor: 32, source: {write_autoencoder(tmp_path / 'dc-ae')}}}"
    backbone = "model.backbone={width: 64, num_blocks: 1, caption_width: 32, num_cross_heads: 2}"
    settings = (
        codec,
        backbone,
        "model.prior=none",
        "model.flow.loss_weighting=latent",
        "pretrain.crop_px=128",
        "experts.train.crop_px=128",
    )
    small, large = (training_size(recipe(*settings, f"validation.batch_size={size}"), recipe(*settings).pretrain) for size in (1, 8))
    counted = CodecMemory.of(recipe(*settings).model.codec)
    assert counted is not None
    assert small.codec_weight_bytes == large.codec_weight_bytes == counted.weight_bytes
    assert small.coding_bytes == 4 * counted.encode((4, 4))
    assert large.coding_bytes == 8 * max(counted.encode((4, 4)), counted.decode((4, 4)))
    assert [counted.at_once((4, 4), batch) for batch in (1, 64, 65)] == [1, 64, 64]
    assert counted.at_once((33, 40), 2) == 1
    memory = large.footprint(recipe(*settings).pretrain, gpu=False)
    assert memory.codec == counted.weight_bytes + max(0, large.coding_bytes - large.activation_bytes)
    missing = recipe(*settings, f"model.codec.source={tmp_path / 'away'}")
    assert not training_size(missing, missing.pretrain).codec_counted
