"""Runs, parameters, metrics and the knee, on a real SQLite store."""

import json
import logging
import math
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from mlflow.exceptions import MlflowException

from linearsr.config import CodecConfig
from linearsr.guard import Trip
from linearsr_platform.errors import StageError, UserError
from linearsr_platform.tracking.failures import first_line, reason
from linearsr_platform.tracking.runs import FLUSH_AFTER_S, Tracker
from linearsr_platform.tracking.store import check_reachable, default_artifact_root, default_uri, how_to_open
from linearsr_platform.tracking.values import flatten


@pytest.fixture(scope="module")
def store_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage root whose name needs quoting in a URL."""
    return tmp_path_factory.mktemp("storage") / "a b"


@pytest.fixture(scope="module")
def now_s() -> list[float]:
    """The tracker's clock: one number that a test may change."""
    return [1_700_000_000.0]


@pytest.fixture(scope="module")
def tracker(store_root: Path, now_s: list[float]) -> Iterator[Tracker]:
    """A tracker on a new database; nothing may be said, and nothing written outside the storage root."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    import mlflow  # noqa: F401  (it installs its own handlers when imported, before ours is added)

    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    for logger in loggers:
        logger.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        elsewhere = store_root.parent / "cwd"
        elsewhere.mkdir()
        patch.chdir(elsewhere)
        yield Tracker(default_uri(str(store_root)), "nano", artifact_root=default_artifact_root(str(store_root)), clock=lambda: now_s[0])
        assert list(elsewhere.iterdir()) == []
    for logger in loggers:
        logger.removeHandler(handler)
    assert messages == []


def test_a_pipeline_and_its_stages_are_nested_and_end_as_they_ended(tracker: Tracker, store_root: Path) -> None:
    with tracker.start_pipeline("quick", tags={"recipe_hash": "abc"}, params={"seed": 3}) as pipeline:
        pipeline.mark_skipped("prepare", "same inputs as run 7")
        with tracker.stage_run(pipeline.run_id, "pretrain", params={"train": {"lr": 1e-4}}) as good:
            good.log_text("hello", "notes/hello.txt")
        with pytest.raises(ValueError, match="boom"), tracker.stage_run(pipeline.run_id, "experts") as failed:
            raise ValueError("boom")
        with pytest.raises(KeyboardInterrupt), tracker.stage_run(pipeline.run_id, "finetune") as killed:
            raise KeyboardInterrupt

    client = tracker.client
    parent = client.get_run(pipeline.run_id)
    assert (parent.info.run_name, parent.info.status) == ("quick", "FINISHED")
    assert parent.data.params == {"seed": "3"}
    assert parent.data.tags["recipe_hash"] == "abc"
    assert parent.data.tags["stage.prepare"] == "skipped: same inputs as run 7"
    children = client.search_runs([tracker.experiment_id], f"tags.mlflow.parentRunId = '{pipeline.run_id}'")
    assert {run.info.run_name: run.info.status for run in children} == {"pretrain": "FINISHED", "experts": "FAILED", "finetune": "KILLED"}
    assert {failed.run_id, killed.run_id, good.run_id} == {run.info.run_id for run in children}
    assert client.get_run(good.run_id).data.params == {"train.lr": "0.0001"}
    assert (store_root / "mlartifacts" / "nano" / good.run_id / "artifacts" / "notes" / "hello.txt").read_text() == "hello"


def test_a_second_tracker_finds_the_experiment_and_resumes_a_run(tracker: Tracker) -> None:
    first = tracker.start_pipeline("quick")
    first.finish("FAILED")
    again = Tracker(tracker.uri, "nano")
    assert again.experiment_id == tracker.experiment_id
    with again.resume(first.run_id) as run:
        assert again.client.get_run(run.run_id).info.status == "RUNNING"
    assert again.client.get_run(first.run_id).info.status == "FINISHED"


def test_a_run_that_is_gone_is_not_resumed_and_one_that_cannot_be_is_told(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tracker.start_pipeline("quick")
    assert tracker.resume("no-such-run") is None
    monkeypatch.setattr(tracker.client, "update_run", refuse)
    with pytest.raises(StageError, match=f"opening run {run.run_id} again failed: nobody may"):
        tracker.resume(run.run_id)
    monkeypatch.undo()
    tracker.client.delete_run(run.run_id)
    assert tracker.resume(run.run_id) is None


def refuse(*args: object, **kwargs: object) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

    raise MlflowException("nobody may", PERMISSION_DENIED)


def test_metrics_are_written_in_batches_with_their_steps_and_times(tracker: Tracker, now_s: list[float]) -> None:
    run = tracker.start_pipeline("curves")
    start_s = now_s[0]
    for step in range(1200):
        run.log_metrics(step, {"loss": 1 / (step + 1)}, at_s=start_s - 100 + step / 100)
    history = tracker.client.get_metric_history(run.run_id, "loss")
    assert len(history) == 1000, "a full buffer is written, the rest waits"
    assert [point.step for point in history] == list(range(1000))
    assert history[7].timestamp == round((start_s - 100 + 0.07) * 1000)
    now_s[0] += FLUSH_AFTER_S
    run.log_metrics(1200, {"loss": 0.0})
    assert len(tracker.client.get_metric_history(run.run_id, "loss")) == 1201, "an old buffer is written too"
    run.log_metrics(1201, {"loss": 0.5})
    run.finish()
    assert tracker.client.get_run(run.run_id).data.metrics["loss"] == 0.5


def test_not_finite_metrics_become_tags_and_spoil_nothing(tracker: Tracker) -> None:
    with tracker.start_pipeline("nan") as run:
        run.log_metrics(1, {"loss": math.nan, "psnr_y": 24.0})
        run.log_metrics(2, {"loss": math.inf, "psnr_y": 25.0})
    data = tracker.client.get_run(run.run_id).data
    assert data.metrics == {"psnr_y": 25.0}
    assert data.tags["nonfinite.loss"] == "nan at step 1"


def test_parameters_are_flat_bounded_and_many(tracker: Tracker) -> None:
    settings = {"codec": CodecConfig(factor=8), "betas": (0.9, 0.999), "none": None, "empty": {}, "a,b": "x" * 9000}
    flat = flatten(settings)
    assert (flat["codec.factor"], flat["betas"]) == ("8", "[0.9, 0.999]")
    assert (flat["none"], flat["empty"]) == ("None", "{}")
    assert flat["a_b"] == "x" * 497 + "..."
    with tracker.start_pipeline("params", params={**settings, **{f"p{i}": i for i in range(250)}}) as run:
        pass
    assert len(tracker.client.get_run(run.run_id).data.params) == len(flat) + 250


def test_the_knee_its_reason_and_the_curve_are_kept(tracker: Tracker) -> None:
    history = [{"step": 10, "psnr_y": 24.0}, {"step": 20, "psnr_y": 25.0}, {"step": 30, "psnr_y": 24.9}]
    with tracker.start_pipeline("knee") as run, tracker.start_pipeline("no knee") as without:
        run.log_knee(knee_step=20, decision={"state": "confirmed", "reason": "psnr_y fell for 1 point"}, history=history)
        without.log_knee(knee_step=None, decision={"state": "improving", "reason": "max_steps came first"}, history=history)
    data = tracker.client.get_run(run.run_id).data
    assert (data.tags["knee"], data.tags["knee.reason"]) == ("20", "psnr_y fell for 1 point")
    assert data.metrics == {"knee/step": 20.0, "knee/psnr_y": 25.0}
    assert json.loads(Path(tracker.client.download_artifacts(run.run_id, "knee.json")).read_text())["history"] == history
    assert tracker.client.get_run(without.run_id).data.tags["knee"] == "none"


def test_trips_of_the_guard_are_counted_and_kept(tracker: Tracker) -> None:
    told = {
        "statistic": "loss",
        "value": "nan",
        "limit": "a finite number",
        "layer": "head.weight",
        "evidence": "gradient of head.weight: nan",
    }
    rest = {"bad_data": False, "action": "rolled back", "rolled_back_to": 100, "lr_scale": 0.5}
    trips = [Trip(step=117 + i, detected_at=120 + i, number=i + 1, **told, **rest) for i in range(2)]
    with tracker.start_pipeline("guarded") as run:
        run.log_trips(trips[:1])
        run.log_trips(trips)
    data = tracker.client.get_run(run.run_id).data
    assert data.tags["guard.trips"] == "2"
    assert "gradient of head.weight: nan; back to step 100" in data.tags["guard.last"]
    points = tracker.client.get_metric_history(run.run_id, "guard/trips")
    assert [(point.step, point.value) for point in points] == [(120, 1.0), (121, 2.0)]
    kept = json.loads(Path(tracker.client.download_artifacts(run.run_id, "guard.json")).read_text())
    assert [Trip(**trip) for trip in kept] == trips


def test_a_refusal_of_the_store_is_one_sentence(tracker: Tracker) -> None:
    run = tracker.start_pipeline("immutable", params={"seed": 1})
    with pytest.raises(StageError, match=r"^tracking: logging parameters of run .* failed: "):
        run.log_params({"seed": 2})
    run.finish()


def test_a_deleted_experiment_says_how_to_restore_it(tracker: Tracker) -> None:
    gone = Tracker(tracker.uri, "gone")
    gone.client.delete_experiment(gone.experiment_id)
    with pytest.raises(UserError, match=f"'gone'.*mlflow experiments restore --experiment-id {gone.experiment_id}"):
        Tracker(tracker.uri, "gone")


def test_a_server_that_is_not_there_is_named_quickly() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for uri in (f"http://127.0.0.1:{port}", f"postgresql+psycopg2://me:secret@127.0.0.1:{port}/mlflow"):
        with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port}.*mlflow server") as caught:
            check_reachable(uri, timeout_s=1)
        assert "secret" not in str(caught.value)


def test_a_server_is_asked_at_its_host_whatever_name_and_password_the_uri_has() -> None:
    asked: list[str] = []

    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        check_reachable(f"http://me:se%40cret@127.0.0.1:{server.server_port}/mlflow/")
        server.shutdown()
    assert asked == ["/mlflow/health"]


def test_what_mlflow_says_of_its_server_is_shown_without_the_password() -> None:
    error = MlflowException("API request to http://me:secret@mlflow:5000/api/2.0/mlflow/runs/update failed with exception")
    for shown in (first_line(error), reason(error)):
        assert "secret" not in shown
        assert "mlflow:5000/api" in shown


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "mlruns"])
def test_a_folder_is_refused_with_the_sqlite_form(uri: str) -> None:
    with pytest.raises(UserError, match=r"fix: --set tracking.uri=sqlite:///"):
        check_reachable(uri)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is not a database, it is a text that somebody put here")
    with pytest.raises(UserError, match=r"tracking.uri: got 'sqlite:///.*mlflow.db'"):
        Tracker(default_uri(str(tmp_path)), "x")


@pytest.mark.parametrize(
    ("uri", "opened"),
    [
        ("https://me:secret@mlflow.example:5000", "https://me:***@mlflow.example:5000"),
        ("postgresql://me:secret@db/mlflow", "mlflow ui --backend-store-uri postgresql://me:***@db/mlflow"),
        ("sqlite:///runs/mlflow.db", "mlflow ui --backend-store-uri sqlite:///runs/mlflow.db"),
    ],
)
def test_a_server_is_opened_by_its_address_and_a_database_by_a_command_without_the_password(uri: str, opened: str) -> None:
    assert how_to_open(uri) == opened


def test_a_remote_storage_root_needs_a_server() -> None:
    with pytest.raises(UserError, match=r"s3://bucket/runs.*tracking.uri"):
        default_uri("s3://bucket/runs")
    assert default_artifact_root("s3://bucket/runs") == "s3://bucket/runs/mlartifacts"
