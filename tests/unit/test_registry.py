"""Bundles as model versions, the gate between challenger and champion, and its history, on a real SQLite registry."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from linearsr.bundle import load_bundle, save_bundle
from linearsr.config import BackboneConfig, CodecConfig, LatentStatistics, ModelConfig, SamplerConfig
from linearsr.model import SuperResolver
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.schema import PromoteSection
from linearsr_platform.registry.models import Evaluation, ModelVersion, aliases_of, find_version, list_models, resolve
from linearsr_platform.registry.promotion import decide, history, promote
from linearsr_platform.registry.register import register
from linearsr_platform.tracking.runs import Tracker
from linearsr_platform.tracking.store import default_artifact_root, default_uri

MakeBundle = Callable[[str], Path]


@pytest.fixture(scope="module")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """A function that makes a bundle of two tiny random experts; its argument is its recipe hash, and so its identity."""
    folder = tmp_path_factory.mktemp("bundles")
    backbone = BackboneConfig(width=8, num_blocks=1, head_width=8, num_cross_heads=1, caption_width=4, stem_width=4)
    config = ModelConfig(scale=2, codec=CodecConfig(factor=2), backbone=backbone, prior="lr")
    ones = (1.0,) * config.codec.latent_channels
    statistics = LatentStatistics(mean=(0.0,) * len(ones), std=ones, residual_std=ones)
    weights = folder / "weights.safetensors"
    save_file(SuperResolver(config, statistics).state_dict(), weights)

    def make(recipe_hash: str) -> Path:
        if (folder / recipe_hash).exists():
            return folder / recipe_hash
        save_bundle(
            folder / recipe_hash,
            config=config,
            statistics=statistics,
            boundaries=(0.875,),
            sampler=SamplerConfig(num_steps=2),
            expert_weights=[weights, weights],
            lineage={"recipe_hash": recipe_hash, "knee_steps": {"expert-1": 40}},
        )
        return folder / recipe_hash

    return make


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    store = str(tmp_path_factory.mktemp("storage"))
    return Tracker(default_uri(store), "nano", artifact_root=default_artifact_root(store))


@pytest.fixture(scope="module")
def run_id(tracker: Tracker) -> str:
    """A run of the register stage inside a pipeline."""
    return tracker.stage_run(tracker.start_pipeline("quick").run_id, "register").run_id


def evaluation(psnr_y: float, *, test_set: str = "images-1", seed: int = 0, gmsd: float = 0.1) -> Evaluation:
    rows = {"bicubic": {"psnr_y": 24.5}, "one_step": {"psnr_y": psnr_y, "gmsd": gmsd}, "routed": {"psnr_y": psnr_y - 1, "gmsd": gmsd}}
    return Evaluation(protocol={"name": "quickstart", "seed": seed}, test_set=test_set, rows=rows)


def version(number: int, stored: Evaluation | None) -> ModelVersion:
    tags = {} if stored is None else {"evaluation": stored.to_json()}
    return ModelVersion(name="m", version=number, aliases=(), created_s=0.0, run_id=None, tags=tags)


def test_a_bundle_becomes_a_version_with_lineage_and_the_same_bundle_does_so_once(
    tracker: Tracker, run_id: str, make_bundle: MakeBundle
) -> None:
    client, bundle = tracker.client, make_bundle("recipe-a")
    assert register(client, bundle, name="once", evaluation=evaluation(24.0), run_id=run_id, tags={"manifest_hash": "m1"}) == 1
    first = find_version(client, "once", "challenger")
    assert first.tags["lineage.recipe_hash"] == "recipe-a"
    assert json.loads(first.tags["lineage.knee_steps"]) == {"expert-1": 40}
    assert first.tags["manifest_hash"] == "m1"
    assert first.tags["parent_run"] == client.get_run(run_id).data.tags["mlflow.parentRunId"]
    assert first.evaluation == evaluation(24.0)

    assert register(client, make_bundle("recipe-b"), name="once", evaluation=evaluation(24.1), run_id=run_id) == 2
    assert aliases_of(client, "once") == {"challenger": 2}
    assert load_bundle(resolve("models:/once/1", lambda: client)).lineage["recipe_hash"] == "recipe-a", "one run may register two"
    assert register(client, bundle, name="once", evaluation=evaluation(24.2), run_id=run_id) == 1
    assert aliases_of(client, "once") == {"challenger": 1}
    assert find_version(client, "once", 1).evaluation == evaluation(24.2), "evaluated again"
    assert [(found.name, found.version, found.aliases) for found in list_models(client) if found.name == "once"] == [
        ("once", 2, ()),
        ("once", 1, ("challenger",)),
    ]


def test_a_damaged_bundle_is_refused_before_anything_is_registered(tracker: Tracker, run_id: str, make_bundle: MakeBundle) -> None:
    bundle = make_bundle("damaged")
    with (bundle / "expert-2.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"expert-2\.safetensors"):
        register(tracker.client, bundle, name="damaged", evaluation=evaluation(24.0), run_id=run_id)
    assert "damaged" not in {found.name for found in list_models(tracker.client)}


def test_a_process_with_only_the_package_loads_it_with_plain_mlflow(
    tracker: Tracker, run_id: str, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    register(tracker.client, make_bundle("plain"), name="plain", evaluation=evaluation(24.0), run_id=run_id)
    script = """
import mlflow, numpy as np
model = mlflow.pyfunc.load_model("models:/plain@challenger")
lr = np.random.default_rng(0).random((2, 3, 12, 20), dtype=np.float32)
routed, one_step = model.predict(lr, params={"seed": 1}), model.predict(lr, params={"estimate": "one_step", "tags": ["sky"]})
assert routed.shape == one_step.shape == (2, 3, 24, 40) and routed.dtype == np.float32, (routed.shape, routed.dtype)
assert 0 <= routed.min() and routed.max() <= 1 and not np.array_equal(routed, one_step)
assert np.array_equal(routed, model.predict(lr, params={"seed": 1, "steps": 2})), "the bundle's own number of steps is 2"
assert not np.array_equal(routed, model.predict(lr, params={"seed": 1, "steps": 3}))
for wrong in (lr.astype(np.float64), lr[:, :1]):
    try:
        model.predict(wrong)
    except mlflow.MlflowException:
        continue
    raise SystemExit(f"{wrong.dtype} {wrong.shape} was accepted")
"""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": tracker.uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    files = {path.suffix for path in resolve("models:/plain/1", lambda: tracker.client).parents[1].rglob("*") if path.is_file()}
    assert not files & {".pkl", ".pickle", ".pt", ".pth"}


def test_a_reference_becomes_a_local_bundle(tracker: Tracker, run_id: str, make_bundle: MakeBundle) -> None:
    bundle = make_bundle("reference")
    register(tracker.client, bundle, name="reference", evaluation=evaluation(24.0), run_id=run_id)
    by_alias = resolve("models:/reference@challenger", lambda: tracker.client)
    assert load_bundle(by_alias).lineage == load_bundle(bundle).lineage
    assert resolve("models:/reference/1", lambda: tracker.client) == by_alias
    assert resolve(str(bundle), lambda: pytest.fail("a folder needs no registry")) == bundle

    meddled = by_alias / "bundle.json"
    meddled.write_text(meddled.read_text() + " ")
    with pytest.raises(UserError, match="SHA-256"):
        resolve("models:/reference@challenger", lambda: tracker.client)


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("models:/nearly-thre@champion", "did you mean 'nearly-three'"),
        ("models:/nearly-three@chalenger", "did you mean 'challenger'"),
        ("models:/nearly-three/7", "got models:/nearly-three/7; expected one of 1"),
        ("models:/nearly-three", "models:/NAME@ALIAS"),
        ("no/such/folder", "bundle.json"),
    ],
)
def test_a_wrong_reference_names_what_there_is(tracker: Tracker, run_id: str, make_bundle: MakeBundle, reference: str, said: str) -> None:
    register(tracker.client, make_bundle("near"), name="nearly-three", evaluation=evaluation(24.0), run_id=run_id)
    with pytest.raises(UserError, match=said):
        resolve(reference, lambda: tracker.client)


def test_the_champion_moves_only_to_a_better_version_and_each_move_is_recorded(
    tracker: Tracker, run_id: str, make_bundle: MakeBundle
) -> None:
    client, rule = tracker.client, PromoteSection()

    def challenge(recipe_hash: str, psnr_y: float, at_s: float) -> tuple[bool, dict[str, int]]:
        register(client, make_bundle(recipe_hash), name="gate", evaluation=evaluation(psnr_y), run_id=run_id)
        decision = promote(client, "gate", rule=rule, by="ada", clock=lambda: at_s)
        return decision.promoted, aliases_of(client, "gate")

    assert challenge("gate-1", 24.7, 100.0) == (True, {"challenger": 1, "champion": 1})
    assert challenge("gate-2", 24.6, 200.0) == (False, {"challenger": 2, "champion": 1})
    assert challenge("gate-3", 24.8, 300.0) == (True, {"challenger": 3, "champion": 3})
    assert challenge("gate-3", 24.8, 400.0) == (True, {"challenger": 3, "champion": 3}), "asking twice changes nothing"
    rows = [(row.at, row.by, row.from_version, row.to_version, row.champion_value, row.challenger_value) for row in history(client, "gate")]
    assert rows == [
        ("1970-01-01T00:01:40+00:00", "ada", None, 1, None, 24.7),
        ("1970-01-01T00:05:00+00:00", "ada", 1, 3, 24.7, 24.8),
    ]


@pytest.mark.parametrize(
    ("metric", "tolerance", "challenger", "champion", "promoted", "said"),
    [
        ("psnr_y", 0.0, evaluation(24.0), None, True, r"first champion.*24\b.*bicubic has 24\.5"),
        (
            "psnr_y",
            0.0,
            evaluation(24.7),
            evaluation(24.8),
            False,
            r"challenger version 2 has 24\.7, champion version 1 has 24\.8; worse by 0\.1",
        ),
        ("psnr_y", 0.2, evaluation(24.7), evaluation(24.8), True, r"24\.7.*24\.8.*tolerance 0\.2 allows"),
        ("psnr_y", 0.0, evaluation(24.8), evaluation(24.8), True, "equal"),
        ("gmsd", 0.0, evaluation(24.0, gmsd=0.05), evaluation(25.0, gmsd=0.06), True, "lower is better.*better by"),
        ("gmsd", 0.0, evaluation(25.0, gmsd=0.06), evaluation(24.0, gmsd=0.05), False, "lower is better.*worse by"),
        ("psnr_y", 9.0, evaluation(30.0), evaluation(24.0, test_set="images-2"), False, "cannot be compared.*images-1 and images-2"),
        ("psnr_y", 9.0, evaluation(30.0), evaluation(24.0, seed=1), False, "cannot be compared.*seed 0 and 1"),
        ("psnr_y", 9.0, evaluation(float("nan")), evaluation(24.0), False, "nan.*evaluate it again"),
        ("psnr_y", 9.0, evaluation(30.0), evaluation(float("nan")), False, "cannot be compared.*nan"),
        ("ssim_y", 9.0, evaluation(30.0), None, False, "ssim_y None"),
        ("psnr_y", 9.0, None, evaluation(24.0), False, "None"),
    ],
)
def test_the_gate(
    metric: str, tolerance: float, challenger: Evaluation | None, champion: Evaluation | None, promoted: bool, said: str
) -> None:
    decision = decide(
        version(2, challenger), None if champion is None else version(1, champion), PromoteSection(metric=metric, tolerance=tolerance)
    )
    assert decision.promoted is promoted
    assert re.search(said, decision.reason), decision.reason


def test_the_gate_reads_the_estimate_that_the_rule_names() -> None:
    decision = decide(version(2, evaluation(25.0)), version(1, evaluation(24.0)), PromoteSection(estimate="routed"))
    assert (decision.metric, decision.challenger_value, decision.champion_value) == ("routed psnr_y", 24.0, 23.0)


def test_a_spoilt_evaluation_is_named() -> None:
    spoilt = ModelVersion(name="m", version=3, aliases=(), created_s=0.0, run_id=None, tags={"evaluation": "[]"})
    with pytest.raises(UserError, match=r"m version 3.*protocol, test_set and rows"):
        decide(spoilt, None, PromoteSection())
