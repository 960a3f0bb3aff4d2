"""The registry on a real `mlflow server` with PostgreSQL behind it and the files in an S3 store, all on loopback."""

import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from safetensors.torch import save_file
from servers import mlflow_server, postgres_server
from typer.testing import CliRunner, Result

from linearsr.bundle import BundleError, load_bundle, save_bundle
from linearsr.config import BackboneConfig, CodecConfig, LatentStatistics, ModelConfig, SamplerConfig
from linearsr.model import SuperResolver
from linearsr_platform.cli.app import app
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.promote_schema import PromoteSection
from linearsr_platform.registry import promotion
from linearsr_platform.registry.evaluation import Evaluation, ProtocolTable
from linearsr_platform.registry.gate import RuleOutcome, judge
from linearsr_platform.registry.history import read_history
from linearsr_platform.registry.models import aliases_of, find_version, read_evaluation, resolve
from linearsr_platform.registry.register import register
from linearsr_platform.tracking.runs import Tracker
from linearsr_platform.tracking.store import connect

pytestmark = pytest.mark.server

BUCKET = "models"
BETTER = PromoteSection.model_validate_json('{"rules": [{"rule": "same_protocol"}, {"rule": "better", "metric": "psnr_y"}]}')


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of an S3 store with an empty bucket; credentials and address are in the environment, as MLflow wants them."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    names = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {**names, "MLFLOW_S3_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patched.setenv(name, value)
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket=BUCKET)
        yield client
    server.stop()


@pytest.fixture(scope="module")
def uri(s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with postgres_server() as database, mlflow_server(tmp_path_factory.mktemp("server"), database, f"s3://{BUCKET}/files") as (uri, _):
        yield uri


@pytest.fixture(scope="module")
def tracker(uri: str) -> Tracker:
    return Tracker(uri, "nano")


def make_bundle(folder: Path, name: str, shift: float) -> Path:
    backbone = BackboneConfig(width=8, num_blocks=1, head_width=8, num_cross_heads=1, caption_width=4, stem_width=4)
    config = ModelConfig(scale=2, codec=CodecConfig(factor=2), backbone=backbone)
    ones = (1.0,) * config.codec.latent_channels
    statistics = LatentStatistics(mean=(0.0,) * len(ones), std=ones, residual_std=ones)
    weights = folder / f"{name}.safetensors"
    save_file({key: value + shift for key, value in SuperResolver(config, statistics).state_dict().items()}, weights)
    save_bundle(
        folder / name,
        config=config,
        statistics=statistics,
        boundaries=(0.5,),
        sampler=SamplerConfig(num_steps=2),
        expert_weights=[weights, weights],
        lineage={"recipe_hash": name, "note": "x" * 6000},
    )
    return folder / name


def evaluation(gain: float) -> Evaluation:
    """A thousand images: more than a tag would hold."""
    values = {f"photograph-{index:04d}": 20.0 + index % 10 + gain for index in range(1000)}
    rows = {"one_step": {"psnr_y": sum(values.values()) / len(values)}}
    table = ProtocolTable(protocol={"seed": 0}, test_set="t", rows=rows, values={"one_step": {"psnr_y": values}})
    return Evaluation(tables={"classic": table})


def linearsr(*words: object, uri: str) -> Result:
    return CliRunner().invoke(app, [*map(str, words), "--tracking-uri", uri])


def promote_in_a_process(uri: str, version: int, all_have_read: Any, answers: Any) -> None:
    """Promote one version; what the champion is has been read by all before any of them decides."""

    def judge_together(*arguments: Any) -> tuple[RuleOutcome, ...]:
        all_have_read.wait(60)
        return judge(*arguments)

    with patch("linearsr_platform.registry.promotion.judge", judge_together):
        decision = promotion.promote(connect(uri), "net", section=BETTER, by=f"process {version}", version=version)
    answers.put((version, decision.state, decision.reason))


def test_versions_are_registered_raced_rolled_back_and_guarded(tracker: Tracker, uri: str, s3: Any, tmp_path: Path) -> None:
    client = tracker.client
    run_id = tracker.start_pipeline("net").run_id
    for number in (1, 2, 3):
        bundle = make_bundle(tmp_path, f"bundle-{number}", number)
        assert register(client, bundle, name="net", evaluation=evaluation(number / 10), run_id=run_id, rules=BETTER) == number
    assert read_evaluation(client, find_version(client, "net", 2)) == evaluation(0.2)
    assert promotion.promote(client, "net", section=BETTER, by="ada", version=1).state == "promoted"

    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(2), context.Queue()
    processes = [context.Process(target=promote_in_a_process, args=(uri, version, barrier, answers)) for version in (2, 3)]
    for process in processes:
        process.start()
    told = sorted((answers.get(timeout=60) for _ in processes), key=lambda answer: answer[1])
    for process in processes:
        process.join()
    (winner, *_), (loser, _, reason) = told
    assert [state for _, state, _ in told] == ["promoted", "too late"]
    assert f"process {winner} made version {winner} the champion first" in reason
    assert aliases_of(client, "net")["champion"] == winner
    assert [(row.to_version, row.holds) for row in read_history(client, "net").rows] == [(1, True), (winner, True), (loser, False)]

    back = linearsr("models", "rollback", "net", "--reason", "too bold", uri=uri)
    assert (back.exit_code, back.stdout) == (0, f"models:/net@champion is version 1 again; it was {winner}\n"), back.stderr
    again = linearsr("models", "promote", "net/3", uri=uri)
    assert again.exit_code == 0, again.stderr
    assert "rules that net/3 was registered with" in again.stdout
    refused = linearsr("models", "promote", "net/2", uri=uri)
    assert refused.exit_code == 1
    assert "FAIL" in refused.stdout
    assert "1 of 2 rules failed" in refused.stderr
    rows = json.loads(linearsr("models", "history", "net", "--json", uri=uri).stdout)
    assert [(row["action"], row["to_version"], row["holds"], row["reason"]) for row in rows[3:]] == [
        ("rollback", 1, True, "too bold"),
        ("promote", 3, True, ""),
    ]
    shown = linearsr("models", "show", "net@champion", "--json", uri=uri)
    assert json.loads(shown.stdout)["tags"]["lineage.note"] == "x" * 6000

    cached = resolve("models:/net/3", lambda: connect(uri), cache=tmp_path / "cache")
    assert load_bundle(cached).lineage["recipe_hash"] == "bundle-3"
    (cached / "bundle.json").write_bytes((cached / "bundle.json").read_bytes() + b" ")
    with pytest.raises(UserError, match="SHA-256"):
        resolve("models:/net/3", lambda: connect(uri), cache=tmp_path / "cache")
    weights = f"model-{find_version(client, 'net', 3).tags['bundle_digest'][:12]}/artifacts/bundle/expert-1.safetensors"
    (key,) = (each["Key"] for each in objects(s3) if each["Key"].endswith(weights))
    body = s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    s3.put_object(Bucket=BUCKET, Key=key, Body=body[:-1] + bytes([body[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"expert-1\.safetensors: got SHA-256"):
        load_bundle(resolve("models:/net/3", lambda: connect(uri), cache=tmp_path / "other"))


def objects(s3: Any) -> list[dict[str, Any]]:
    return [each for page in s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET) for each in page.get("Contents", [])]


@pytest.mark.parametrize("by", ["the server", "the client"])
def test_a_big_file_goes_to_the_store_in_parts(tracker: Tracker, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    file = tmp_path / f"weights-{by.removeprefix('the ')}.safetensors"
    file.write_bytes(os.urandom(1 << 20) * 60)
    if by == "the client":
        monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "true")
        monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", str(50 << 20))
    run = tracker.start_pipeline("big")
    run.log_artifact(file, "weights")
    (stored,) = (each for each in objects(s3) if each["Key"].endswith(file.name))
    assert stored["Size"] == file.stat().st_size
    # S3 writes the number of parts behind the hash: 60 MiB in parts of boto3's 8 MiB, or MLflow's 10 MiB.
    assert stored["ETag"].strip('"').rpartition("-")[2] == {"the server": "8", "the client": "6"}[by]
    fetched = Path(tracker.client.download_artifacts(run.run_id, f"weights/{file.name}", str(tmp_path)))
    assert fetched.read_bytes() == file.read_bytes()
