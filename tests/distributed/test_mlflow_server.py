"""Tracking and registry through a real `mlflow server` on loopback, with the files behind the server."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file
from servers import mlflow_server, stop

from linearsr.bundle import load_bundle, save_bundle
from linearsr.config import BackboneConfig, CodecConfig, LatentStatistics, ModelConfig, SamplerConfig
from linearsr.model import SuperResolver
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.promote_schema import PromoteSection
from linearsr_platform.registry.evaluation import Evaluation, ProtocolTable
from linearsr_platform.registry.history import read_history
from linearsr_platform.registry.models import aliases_of, resolve
from linearsr_platform.registry.promotion import promote
from linearsr_platform.registry.register import register
from linearsr_platform.tracking.runs import Tracker
from linearsr_platform.tracking.store import connect

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """URI and process of a server that keeps records in SQLite and serves files itself."""
    folder = tmp_path_factory.mktemp("server")
    with mlflow_server(folder, f"sqlite:///{folder / 'mlflow.db'}", str(folder / "files")) as running:
        yield running


def _bundle(folder: Path) -> Path:
    backbone = BackboneConfig(width=8, num_blocks=1, head_width=8, num_cross_heads=1, caption_width=4, stem_width=4)
    config = ModelConfig(scale=2, codec=CodecConfig(factor=2), backbone=backbone)
    ones = (1.0,) * config.codec.latent_channels
    statistics = LatentStatistics(mean=(0.0,) * len(ones), std=ones, residual_std=ones)
    weights = folder / "weights.safetensors"
    save_file(SuperResolver(config, statistics).state_dict(), weights)
    save_bundle(
        folder / "bundle",
        config=config,
        statistics=statistics,
        boundaries=(),
        sampler=SamplerConfig(num_steps=1),
        expert_weights=[weights],
        lineage={"recipe_hash": "abc"},
    )
    return folder / "bundle"


def test_a_pipeline_is_tracked_registered_promoted_and_fetched_through_a_server(
    server: tuple[str, "subprocess.Popen[bytes]"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, process = server
    working_folder = tmp_path / "cwd"
    working_folder.mkdir()
    monkeypatch.chdir(working_folder)
    tracker = Tracker(uri, "quick", artifact_root=str(tmp_path / "not-used"))
    points = [{"step": step, "psnr_y": 24.0 + step} for step in range(3)]
    with tracker.start_pipeline("quick", params={"seed": 0}) as pipeline, tracker.stage_run(pipeline.run_id, "pretrain") as stage:
        for point in points:
            stage.log_metrics(point["step"], {"psnr_y": point["psnr_y"]})
        stage.log_knee(knee_step=1, decision={"state": "confirmed", "reason": "because"}, history=points)
        bundle = _bundle(tmp_path)
        table = ProtocolTable(protocol={"seed": 0}, test_set="t", rows={"one_step": {"psnr_y": 25.0}})
        numbers = Evaluation(tables={"quickstart": table})
        assert register(tracker.client, bundle, name="quick", evaluation=numbers, run_id=stage.run_id) == 1

    data = tracker.client.get_run(stage.run_id).data
    assert data.metrics == {"psnr_y": 26.0, "knee/step": 1.0, "knee/psnr_y": 25.0}
    assert data.tags["knee"] == "1"

    assert promote(tracker.client, "quick", section=PromoteSection(), by="ada").promoted
    assert aliases_of(tracker.client, "quick") == {"challenger": 1, "champion": 1}
    assert [(row.by, row.to_version) for row in read_history(tracker.client, "quick").rows] == [("ada", 1)]

    fetched = resolve("models:/quick@champion", lambda: connect(uri), cache=tmp_path / "cache")
    assert fetched.is_relative_to(tmp_path / "cache")
    assert load_bundle(fetched).lineage == load_bundle(bundle).lineage
    written = fetched.stat().st_mtime_ns
    assert resolve("models:/quick/1", lambda: connect(uri), cache=tmp_path / "cache") == fetched
    assert fetched.stat().st_mtime_ns == written, "fetched once"
    assert not (tmp_path / "not-used").exists()
    assert list(working_folder.iterdir()) == []

    stop(process)
    with pytest.raises(UserError, match=rf"{uri}.*mlflow server"):
        Tracker(uri, "quick")
