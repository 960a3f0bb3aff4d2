"""Bundles as model versions: lineage, evaluation, tampering, one expert replaced; on a real SQLite registry."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow.pyfunc
import pytest
from safetensors.torch import load_file, save_file

from linearsr.bundle import BundleError, load_bundle, save_bundle
from linearsr.config import BackboneConfig, CodecConfig, LatentStatistics, ModelConfig, SamplerConfig
from linearsr.model import SuperResolver
from linearsr_platform.errors import UserError
from linearsr_platform.registry.compare import compare, experts_of
from linearsr_platform.registry.evaluation import Evaluation, ProtocolTable
from linearsr_platform.registry.models import aliases_of, find_reference, find_version, list_models, read_evaluation, resolve
from linearsr_platform.registry.register import attach_evaluation, register
from linearsr_platform.registry.replace import register_replacement
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


def evaluation(psnr_y: float, *, protocol: str = "quickstart") -> Evaluation:
    """Two images; the second is a decibel harder."""
    values = {"one_step": {"psnr_y": {"coffee": psnr_y + 0.5, "rocket": psnr_y - 0.5}}}
    rows = {"bicubic": {"psnr_y": 24.5}, "one_step": {"psnr_y": psnr_y}}
    return Evaluation(tables={protocol: ProtocolTable(protocol={"seed": 0}, test_set="images-1", rows=rows, values=values)})


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
    assert read_evaluation(client, first) == evaluation(24.0)
    assert json.loads(first.tags["bundle.boundaries"]) == [0.875]
    weights = (bundle / "expert-1.safetensors").read_bytes()
    assert [expert["sha256"] for expert in experts_of(first)] == [hashlib.sha256(weights).hexdigest()] * 2

    assert register(client, make_bundle("recipe-b"), name="once", evaluation=evaluation(24.1), run_id=run_id) == 2
    assert aliases_of(client, "once") == {"challenger": 2}
    assert load_bundle(resolve("models:/once/1", lambda: client)).lineage["recipe_hash"] == "recipe-a", "one run may register two"
    assert register(client, bundle, name="once", evaluation=evaluation(24.2), run_id=run_id) == 1
    assert aliases_of(client, "once") == {"challenger": 1}
    assert read_evaluation(client, find_version(client, "once", 1)) == evaluation(24.2), "evaluated again"
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


def test_a_version_keeps_one_table_a_protocol(tracker: Tracker, run_id: str, make_bundle: MakeBundle) -> None:
    client = tracker.client
    register(client, make_bundle("tables"), name="tables", evaluation=evaluation(24.0), run_id=run_id)
    attach_evaluation(client, find_version(client, "tables", 1), evaluation(23.0, protocol="classic"))
    attach_evaluation(client, find_version(client, "tables", 1), evaluation(25.0))
    expected = Evaluation(tables={**evaluation(25.0).tables, **evaluation(23.0, protocol="classic").tables})
    version = find_version(client, "tables", 1)
    assert read_evaluation(client, version) == expected
    assert version.evaluation is not None
    assert {name: table.values for name, table in version.evaluation.tables.items()} == {"quickstart": {}, "classic": {}}


def test_an_evaluation_of_an_earlier_release_is_still_read_and_a_spoilt_one_is_named(
    tracker: Tracker, run_id: str, make_bundle: MakeBundle
) -> None:
    client = tracker.client
    register(client, make_bundle("old"), name="old", evaluation=None, run_id=run_id)
    assert read_evaluation(client, find_version(client, "old", 1)) is None
    old = {"protocol": {"metrics": "classic: 8 bit"}, "test_set": "t", "rows": {"routed": {"psnr_y": 24.0}}}
    client.set_model_version_tag("old", "1", "evaluation", json.dumps(old))
    found = find_version(client, "old", 1).evaluation
    assert found is not None
    assert found.tables["classic"].rows == old["rows"]
    client.set_model_version_tag("old", "1", "evaluation", "[]")
    with pytest.raises(UserError, match=r"old/1.*protocol, test_set and rows"):
        _ = find_version(client, "old", 1).evaluation


@pytest.mark.parametrize("what", ["weights", "manifest", "both"])
def test_a_tampered_bundle_is_refused_by_this_program(tracker: Tracker, run_id: str, make_bundle: MakeBundle, what: str) -> None:
    client = tracker.client
    register(client, make_bundle(f"tampered-{what}"), name=f"tampered-{what}", evaluation=None, run_id=run_id)
    folder = resolve(f"models:/tampered-{what}/1", lambda: client)
    tamper(folder, what)
    with pytest.raises((UserError, BundleError), match="SHA-256"):
        load_bundle(resolve(f"models:/tampered-{what}/1", lambda: client))


def test_plain_mlflow_refuses_a_bundle_that_is_whole_but_another(tracker: Tracker, run_id: str, make_bundle: MakeBundle) -> None:
    client = tracker.client
    register(client, make_bundle("swapped"), name="swapped", evaluation=None, run_id=run_id)
    folder = resolve("models:/swapped/1", lambda: client)
    tamper(folder, "both")
    load_bundle(folder)
    with pytest.raises(ValueError, match="expected the registered one"):
        mlflow.pyfunc.load_model(str(folder.parents[1]))


def tamper(folder: Path, what: str) -> None:
    """Change weights, the manifest, or weights with the manifest's hash of them."""
    weights, manifest = folder / "expert-1.safetensors", folder / "bundle.json"
    content = json.loads(manifest.read_text())
    if what != "manifest":
        with weights.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
    if what == "both":
        content["files"][weights.name] = hashlib.sha256(weights.read_bytes()).hexdigest()
    if what != "weights":
        content["lineage"]["recipe_hash"] = "forged"
        manifest.write_text(json.dumps(content))


def test_a_tampered_evaluation_is_refused(tracker: Tracker, run_id: str, make_bundle: MakeBundle) -> None:
    client = tracker.client
    register(client, make_bundle("forged"), name="forged", evaluation=evaluation(24.0), run_id=run_id)
    version = find_version(client, "forged", 1)
    (file,) = (resolve("models:/forged/1", lambda: client).parents[1] / "evaluations").iterdir()
    file.write_text(file.read_text().replace("24.5", "34.5"))
    with pytest.raises(UserError, match=r"forged/1.*evaluate it again"):
        read_evaluation(client, version)


def test_one_expert_is_replaced_and_the_new_version_says_so(tracker: Tracker, run_id: str, make_bundle: MakeBundle, tmp_path: Path) -> None:
    client = tracker.client
    register(client, make_bundle("base"), name="parts", evaluation=evaluation(24.0), run_id=run_id)
    base = find_version(client, "parts", 1)
    bundle = load_bundle(make_bundle("base"))
    other = tmp_path / "other.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(bundle.experts[1]).items()}, other)

    made = register_replacement(client, base, number=2, donor=other, donor_name="other.safetensors")
    assert (made.version, made.aliases, made.evaluation) == (2, ("challenger",), None)
    resolved = load_bundle(resolve("models:/parts/2", lambda: client))
    assert resolved.experts[0].read_bytes() == bundle.experts[0].read_bytes()
    assert resolved.experts[1].read_bytes() == other.read_bytes()
    assert (resolved.boundaries, resolved.sampler) == (bundle.boundaries, bundle.sampler)
    assert [expert["from"] for expert in experts_of(made)] == ["models:/parts/1", "other.safetensors"]
    assert json.loads(made.tags["lineage.base"]) == {"model": "models:/parts/1", "digest": bundle.digest}

    found = compare(client, base, made)
    assert {name: first == second for name, (first, second) in found.experts.items()} == {"expert-1": True, "expert-2": False}
    assert found.lineage["replaced"] == (None, "expert-2")
    assert "bundle.boundaries" not in found.lineage

    narrow = tmp_path / "narrow.safetensors"
    save_file({name: tensor for name, tensor in load_file(other).items() if not name.endswith("bias")}, narrow)
    foreign = tmp_path / "foreign"
    shutil.copytree(bundle.folder, foreign)
    content = json.loads((foreign / "bundle.json").read_text())
    (foreign / "bundle.json").write_text(json.dumps({**content, "boundaries": [0.5]}))
    for number, donor, said in (
        (3, other, "expected 1 to 2"),
        (2, bundle.experts[1], "has already"),
        (2, narrow, "got nothing; expected F32"),
        (2, foreign, r"boundaries: got \(0\.5,\); expected \(0\.875,\)"),
        (2, tmp_path / "nothing", "expected safetensors"),
    ):
        with pytest.raises(UserError, match=said):
            register_replacement(client, base, number=number, donor=donor, donor_name="x")
    assert aliases_of(client, "parts") == {"challenger": 2}


def test_versions_are_compared_image_by_image(tracker: Tracker, run_id: str, make_bundle: MakeBundle) -> None:
    client = tracker.client
    for number in (1, 2):
        register(client, make_bundle(f"side-{number}"), name="side", evaluation=evaluation(24.0 + number), run_id=run_id)
    found = compare(client, find_reference(client, "side/1"), find_reference(client, "side@challenger"))
    one_step = next(one for one in found.metrics if one.row == "one_step")
    assert one_step.paired is not None
    # Every image gained exactly 1 dB, so the interval has no width although the images differ by 1 dB from each other.
    assert (one_step.paired.mean, one_step.paired.low, one_step.paired.high, one_step.better) == (1.0, 1.0, 1.0, True)
    assert one_step.paired.weak
    assert next(one for one in found.metrics if one.row == "bicubic").note.startswith("no values per image")
    assert found.lineage["recipe_hash"] == ("side-1", "side-2")
    with pytest.raises(UserError, match="NAME@ALIAS or NAME/VERSION"):
        find_reference(client, "side")
