"""The MLflow runs of trainers, however the stage that trains them ends; on a real SQLite store, without Ray."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from linearsr_platform.cluster.board import Event
from linearsr_platform.cluster.experts import Result, TrainerFailure
from linearsr_platform.errors import StageError, UserError
from linearsr_platform.recipe.train_schema import TrainConfig, ValidationConfig
from linearsr_platform.stages.jobs import run_jobs
from linearsr_platform.tracking.runs import TrackedRun, Tracker
from linearsr_platform.tracking.store import default_artifact_root, default_uri
from linearsr_platform.train.job import TrainJob
from linearsr_platform.train.outcome import TrainOutcome

NAMES = ("expert-1", "expert-2")


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    store = str(tmp_path_factory.mktemp("storage"))
    return Tracker(default_uri(store), "nano", artifact_root=default_artifact_root(store))


@pytest.fixture
def stage(tracker: Tracker) -> Iterator[TrackedRun]:
    with tracker.start_pipeline("quick") as pipeline:
        yield tracker.stage_run(pipeline.run_id, "experts")


class Silent:
    """Shows nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def train(tracker: Tracker, stage: TrackedRun, patch: pytest.MonkeyPatch, folder: Path, came_to: BaseException | dict[str, Result]) -> None:
    """Run two trainers that each log a metric, which is not written at once, and then come to something."""

    def fit_all(jobs: Any, cluster: Any, *, on_poll: Any, **_: Any) -> dict[str, Result]:
        on_poll([Event(sequence=i, source=name, kind="metrics", step=7, values={"loss": 0.5}) for i, name in enumerate(NAMES)])
        if isinstance(came_to, BaseException):
            raise came_to
        return came_to

    patch.setattr("linearsr_platform.stages.jobs.fit_all", fit_all)
    patch.setattr("linearsr_platform.stages.jobs.ProgressBoard", SimpleNamespace(start=Silent))
    recipe = SimpleNamespace(cluster=None, tracking=SimpleNamespace(artifacts="none"))
    context: Any = SimpleNamespace(open_cluster=lambda: None, tracker=tracker, display=Silent(), recipe=recipe)
    settings: Any = {"max_steps": 9, "batch_size": 1, "lr": 1e-3}
    common: Any = {"task": "a:B", "task_config": None, "train": TrainConfig(**settings), "validation": ValidationConfig()}
    jobs = [TrainJob(name=name, **common, train_shards=(), validation_shards=(), output_url=str(folder / name)) for name in NAMES]
    run_jobs(context, jobs, str(folder), stage)


def ends(tracker: Tracker, stage: TrackedRun) -> list[tuple[str, float]]:
    """Return how the trainers' runs ended, and the loss that they have."""
    client, found = tracker.client, []
    for name in NAMES:
        runs = client.search_runs([tracker.experiment_id], f"tags.`mlflow.parentRunId` = '{stage.run_id}' and tags.stage = '{name}'")
        found += [(run.info.status, run.data.metrics["train/loss"]) for run in runs]
        assert all(run.info.end_time for run in runs)
    return found


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), "KILLED"), (UserError("cluster: got 1 CPU; expected 2"), "FAILED"), (StageError("tracking: refused"), "FAILED")],
)
def test_runs_are_finished_with_all_their_metrics_by_whatever_ends_the_stage(
    tracker: Tracker, stage: TrackedRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException, status: str
) -> None:
    with pytest.raises(type(error)) as raised:
        train(tracker, stage, monkeypatch, tmp_path, error)
    assert raised.value is error
    assert ends(tracker, stage) == [(status, 0.5)] * 2


def test_a_run_that_is_not_started_leaves_none_open(
    tracker: Tracker, stage: TrackedRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened: list[TrackedRun] = []
    start = tracker.stage_run

    def refuse_the_second(*arguments: Any, **settings: Any) -> TrackedRun:
        if opened:
            raise StageError("tracking: starting run 'expert-2' failed: no room")
        opened.append(start(*arguments, **settings))
        return opened[0]

    monkeypatch.setattr(tracker, "stage_run", refuse_the_second)
    with pytest.raises(StageError, match="no room"):
        train(tracker, stage, monkeypatch, tmp_path, {})
    assert tracker.client.get_run(opened[0].run_id).info.status == "FAILED"


def test_trainers_that_finish_and_fail_end_each_as_they_do(
    tracker: Tracker, stage: TrackedRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    outcome = TrainOutcome(
        steps=9, stopped_by="max_steps", knee_step=None, knee_weights="a", last_weights="a", seconds=1.0, samples_per_s=9.0,
        decision={"metrics": [], "state": "undecided", "reason": "too short"}, history=[],
    )  # fmt: skip
    failure = TrainerFailure(name=NAMES[1], message="expert-2: a worker died")
    with pytest.raises(StageError, match="1 of 2 trainers failed: expert-2: a worker died; expert-1 finished"):
        train(tracker, stage, monkeypatch, tmp_path, {NAMES[0]: outcome, NAMES[1]: failure})
    assert ends(tracker, stage) == [("FINISHED", 0.5), ("FAILED", 0.5)]
