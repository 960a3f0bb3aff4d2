"""Runs of a pipeline and its stages, written through `MlflowClient` with explicit run ids: no global state of MLflow is used.

Only the driver writes. Metrics are buffered, because one write costs tens of milliseconds whatever its size.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from linearsr.guard import Trip
from linearsr_platform.errors import UserError
from linearsr_platform.tracking.store import connect, mlflow_errors
from linearsr_platform.tracking.values import finite, flatten, legal_key

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

Status = Literal["FINISHED", "FAILED", "KILLED"]

MAX_PARAMS_PER_WRITE = 100
MAX_METRICS_PER_WRITE = 1000
FLUSH_AFTER_S = 2.0
"""Age of the oldest buffered metric that makes the next one write them all."""
MAX_TAG_CHARS = 5000

PARENT_TAG = "mlflow.parentRunId"


class TrackedRun:
    """One MLflow run. As a context manager it is finished at the end: FAILED on an error, KILLED on an interrupt."""

    def __init__(self, client: "MlflowClient", run_id: str, *, clock: Callable[[], float] = time.time) -> None:
        """Write to an existing run.

        Args:
            client: client of the store that holds it.
            run_id: its id.
            clock: seconds since the epoch; gives metrics their timestamps.
        """
        self.run_id = run_id
        self._client = client
        self._clock = clock
        self._buffer: list[Metric] = []
        self._buffered_since_s = 0.0
        self._not_finite: set[str] = set()

    def __enter__(self) -> Self:
        """Return the run itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Finish the run with the status that fits how the block ended."""
        if kind is None:
            self.finish("FINISHED")
        else:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")

    def log_params(self, settings: Mapping[str, object]) -> None:
        """Log nested settings as parameters `a.b.c`; values over 500 characters are cut."""
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in flatten(settings).items()]
        with mlflow_errors(f"logging parameters of run {self.run_id}"):
            for start in range(0, len(params), MAX_PARAMS_PER_WRITE):
                self._client.log_batch(self.run_id, params=params[start : start + MAX_PARAMS_PER_WRITE])

    def log_metrics(self, step: int, values: Mapping[str, float], *, at_s: float | None = None) -> None:
        """Buffer metrics of one step; they are written when the buffer is full or old, by `flush` and by `finish`.

        NaN and infinity are not stored, because a store clamps or refuses them: the first of each name is kept as a tag
        `nonfinite.<name>`.

        Args:
            step: optimizer step, or any other counter that orders the points.
            values: metric name to value.
            at_s: when it was measured, seconds since the epoch; now by default.
        """
        from mlflow.entities import Metric

        now = self._clock()
        good, bad = finite(values)
        timestamp_ms = round((now if at_s is None else at_s) * 1000)
        if not self._buffer:
            self._buffered_since_s = now
        self._buffer += [Metric(legal_key(name), value, timestamp_ms, step) for name, value in good.items()]
        new = {name: value for name, value in bad.items() if name not in self._not_finite}
        if new:
            self._not_finite |= new.keys()
            self.set_tags({f"nonfinite.{name}": f"{value} at step {step}" for name, value in new.items()})
        if len(self._buffer) >= MAX_METRICS_PER_WRITE or now - self._buffered_since_s >= FLUSH_AFTER_S:
            self.flush()

    def flush(self) -> None:
        """Write every buffered metric."""
        with mlflow_errors(f"logging metrics of run {self.run_id}"):
            while self._buffer:
                self._client.log_batch(self.run_id, metrics=self._buffer[:MAX_METRICS_PER_WRITE])
                del self._buffer[:MAX_METRICS_PER_WRITE]

    def log_artifact(self, file: Path, folder: str = "") -> None:
        """Keep a copy of a local file, under `folder` of the run's artifacts."""
        with mlflow_errors(f"storing {file.name} in run {self.run_id}"):
            self._client.log_artifact(self.run_id, str(file), folder or None)

    def log_text(self, text: str, name: str) -> None:
        """Keep a text as the artifact file `name`."""
        with mlflow_errors(f"storing {name} in run {self.run_id}"):
            self._client.log_text(self.run_id, text, name)

    def log_dict(self, value: object, name: str) -> None:
        """Keep a JSON-able value as the artifact file `name`."""
        self.log_text(json.dumps(value, indent=2, default=str) + "\n", name)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Set tags, replacing those of the same name."""
        from mlflow.entities import RunTag

        entities = [RunTag(legal_key(name), str(value)[:MAX_TAG_CHARS]) for name, value in tags.items()]
        with mlflow_errors(f"setting tags of run {self.run_id}"):
            for start in range(0, len(entities), MAX_PARAMS_PER_WRITE):
                self._client.log_batch(self.run_id, tags=entities[start : start + MAX_PARAMS_PER_WRITE])

    def mark_skipped(self, stage: str, because: str) -> None:
        """Note on a pipeline's run that a stage was skipped, and why."""
        self.set_tags({f"stage.{stage}": f"skipped: {because}"})

    def log_knee(
        self,
        *,
        knee_step: int | None,
        decision: Mapping[str, object],
        history: Sequence[Mapping[str, float]],
        picture: Path | None = None,
    ) -> None:
        """Record where training reached its knee: `knee.json` with decision and curves, `knee.png`, `knee/...` metrics, and tags.

        Args:
            knee_step: step of the weights that are handed on; None if there are none but the last.
            decision: what the detector concluded, with `state` and `reason`.
            history: validation points, each with `step` and metrics.
            picture: a PNG of the curves.
        """
        points = [dict(point) for point in history]
        self.log_dict({"knee_step": knee_step, "decision": dict(decision), "history": points}, "knee.json")
        if picture is not None:
            self.log_artifact(picture)
        step = "none" if knee_step is None else knee_step
        self.set_tags({"knee": step, "knee.state": decision["state"], "knee.reason": decision["reason"]})
        if knee_step is None:
            return
        point = next((point for point in history if point["step"] == knee_step), {})
        values = {name: value for name, value in point.items() if name != "step"}
        self.log_metrics(knee_step, {"knee/step": knee_step, **{f"knee/{name}": value for name, value in values.items()}})
        self.flush()

    def log_trips(self, trips: Sequence[Trip]) -> None:
        """Record the guard's trips so far: `guard.json`, the count `guard/trips` at the last one's step, and tags.

        Args:
            trips: all of them, at least one, in order.
        """
        last = trips[-1]
        self.log_dict([trip.to_json() for trip in trips], "guard.json")
        self.set_tags({"guard.trips": len(trips), "guard.last": last.describe()})
        self.log_metrics(last.detected_at, {"guard/trips": len(trips)})
        self.flush()

    def finish(self, status: Status = "FINISHED") -> None:
        """Write what is buffered and close the run."""
        self.flush()
        with mlflow_errors(f"closing run {self.run_id}"):
            self._client.set_terminated(self.run_id, status)


class Tracker:
    """The experiment of one recipe: starts pipeline runs and, nested in them, stage runs."""

    def __init__(self, uri: str, experiment: str, *, artifact_root: str | None = None, clock: Callable[[], float] = time.time) -> None:
        """Connect, and make the experiment if it is new.

        Args:
            uri: tracking URI, see `store.default_uri`.
            experiment: its name.
            artifact_root: URL under which a new experiment keeps its files, see `store.default_artifact_root`; a server decides
                this by itself, so it is not passed on to one.
            clock: seconds since the epoch.

        Raises:
            UserError: if the URI does not answer, or the experiment was deleted.
        """
        self.uri = uri
        self.client = connect(uri)
        self._clock = clock
        location = None if artifact_root is None or uri.startswith("http") else f"{artifact_root.rstrip('/')}/{legal_key(experiment)}"
        self.experiment_id = self._experiment(experiment, location)

    def start_pipeline(
        self, name: str, *, tags: Mapping[str, object] | None = None, params: Mapping[str, object] | None = None
    ) -> TrackedRun:
        """Start the parent run of one invocation; running a recipe again starts another, whose skipped stages are tags."""
        return self._start(name, {**(tags or {}), "kind": "pipeline"}, params or {})

    def stage_run(self, parent_id: str, stage: str, *, params: Mapping[str, object] | None = None) -> TrackedRun:
        """Start the run of a stage, nested in a pipeline's."""
        return self._start(stage, {PARENT_TAG: parent_id, "kind": "stage", "stage": stage}, params or {})

    def find_stage_run(self, parent_id: str, stage: str) -> TrackedRun | None:
        """Return the run of a stage that a pipeline's run has already, or None."""
        with mlflow_errors(f"looking for run {stage!r}"):
            found = self.client.search_runs(
                [self.experiment_id], filter_string=f"tags.`{PARENT_TAG}` = '{parent_id}' and tags.stage = '{stage}'", max_results=1
            )
        return TrackedRun(self.client, found[0].info.run_id, clock=self._clock) if found else None

    def resume(self, run_id: str) -> TrackedRun:
        """Open an existing run again; it counts as running until it is finished.

        Raises:
            UserError: if there is no such run.
        """
        from mlflow.exceptions import MlflowException

        try:
            self.client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            raise UserError(f"run: got {run_id!r}; expected the id of a run in {self.uri}; fix: {error}") from error
        return TrackedRun(self.client, run_id, clock=self._clock)

    def _start(self, name: str, tags: Mapping[str, object], params: Mapping[str, object]) -> TrackedRun:
        """Create a run with tags and parameters."""
        with mlflow_errors(f"starting run {name!r}"):
            created = self.client.create_run(
                self.experiment_id, run_name=name, tags={legal_key(key): str(value)[:MAX_TAG_CHARS] for key, value in tags.items()}
            )
        run = TrackedRun(self.client, created.info.run_id, clock=self._clock)
        run.log_params(params)
        return run

    def _experiment(self, name: str, location: str | None) -> str:
        """Return the id of an experiment, made if new; another process may make it at the same time."""
        from mlflow.exceptions import MlflowException

        with mlflow_errors(f"opening experiment {name!r}"):
            found = self.client.get_experiment_by_name(name)
            if found is None:
                try:
                    return str(self.client.create_experiment(name, artifact_location=location))
                except MlflowException:
                    found = self.client.get_experiment_by_name(name)
                    if found is None:
                        raise
        if found.lifecycle_stage != "active":
            raise UserError(
                f"tracking.experiment: got {name!r}; expected an experiment that was not deleted; "
                f"fix: `mlflow experiments restore --experiment-id {found.experiment_id}`, or choose another name"
            )
        return str(found.experiment_id)
