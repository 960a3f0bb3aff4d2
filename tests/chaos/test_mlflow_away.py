"""The MLflow server is killed while a run trains and comes back 20 s later: the run does not notice, and its curves have no gap."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed" / "toy"))

from mlflow_server import MlflowServer

pytestmark = [pytest.mark.ray, pytest.mark.server, pytest.mark.chaos, pytest.mark.slow, pytest.mark.nightly]
SMOKE = Path(__file__).parents[2] / "pipelines" / "smoke.yaml"
AWAY_S, STEPS = 20.0, 200


def named(client: MlflowClient, name: str) -> list[Run]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(experiments, f"tags.mlflow.runName = '{name}'", order_by=["attributes.start_time"])


def wait_for(condition: Callable[[], bool], driver: "subprocess.Popen[str]", log: Path, limit_s: float = 300.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert driver.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(1)


def test_a_run_does_not_notice_that_mlflow_was_away(tmp_path: Path) -> None:
    # One expert, because four take a minute to start and are not what this is about.
    changed = [f"storage={tmp_path}/runs", f"pretrain.max_steps={STEPS}", "pretrain.log_every=2", "pretrain.validate_every=20"]
    changed += [
        "pretrain.checkpoint_every=20",
        "pretrain.knee.stop=false",
        "experts.boundaries=[]",
        "cluster.num_cpus=2",
        "cluster.object_store_mb=100",
    ]
    log = tmp_path / "driver.log"
    with MlflowServer(tmp_path) as server, log.open("w") as output:
        command = [str(Path(sys.executable).with_name("linearsr")), "run", str(SMOKE), "--set", f"tracking.uri={server.uri}"]
        command += [word for setting in changed for word in ("--set", setting)]
        driver = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "COLUMNS": "200"}, text=True)
        try:
            client = MlflowClient(server.uri)
            wait_for(lambda: any("train/loss" in run.data.metrics for run in named(client, "pretrain")), driver, log)
            server.signal(signal.SIGKILL)
            time.sleep(AWAY_S)
            assert driver.poll() is None, log.read_text()[-4000:]
            server.start()
            driver.wait(timeout=300)
        finally:
            driver.kill()
            driver.wait()
        said = log.read_text()
        assert driver.returncode == 0, said[-4000:]
        trainer = named(client, "pretrain")[-1]
        for name, first, every in (("train/loss", 2, 2), ("validation/psnr_y", 0, 20)):
            points = client.get_metric_history(trainer.info.run_id, name)
            assert [point.step for point in points] == list(range(first, STEPS + 1, every))
        losses = client.get_metric_history(trainer.info.run_id, "train/loss")
        stamps = [point.timestamp for point in losses]
        assert stamps == sorted(stamps), "points keep the time at which they were measured"
        every_run = client.search_runs([trainer.info.experiment_id], max_results=1000)
        assert {run.info.status for run in every_run} == {"FINISHED"}
        assert [run.info.run_name for run in every_run].count("smoke") == 1
        (parent,) = named(client, "smoke")
        assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {"recipe.json", "report.html", "pictures"}
    assert said.count("does not answer") == said.count("is back:") == 1, said
    assert "Traceback" not in said
    assert not (tmp_path / "runs" / "smoke" / "outbox").exists()
    assert (tmp_path / "runs" / "smoke" / "recipe.json").exists()
