"""Runs of a pipeline and its stages, written through `MlflowClient` with explicit run ids: no global state of MLflow is used.

Only the driver writes. Metrics are buffered, because one write costs tens of milliseconds whatever its size. Everything goes through
the outbox: a server that is away for a while delays it and loses nothing.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self
from uuid import uuid4

from linearsr.guard import Trip
from linearsr_platform.errors import UserError
from linearsr_platform.tracking.failures import is_transient
from linearsr_platform.tracking.journal import Journal
from linearsr_platform.tracking.operations import MetricPoint, Operation, send
from linearsr_platform.tracking.outbox import Outbox, Patience
from linearsr_platform.tracking.store import answers, connect, without_password
from linearsr_platform.tracking.values import finite, flatten, legal_key

if TYPE_CHECKING:
    from mlflow import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]

MAX_PARAMS_PER_WRITE = 100
MAX_METRICS_PER_WRITE = 1000
FLUSH_AFTER_S = 2.0
"""Age of the oldest buffered metric that makes the next one write them all."""
MAX_TAG_CHARS = 5000

CLOSE_S = 60.0
"""How long the end of a command waits for a server that is away."""
CLOSE_AFTER_FAILURE_S = 5.0

PARENT_TAG = "mlflow.parentRunId"
START_TAG = "linearsr.start"
"""Holds a word that is drawn for each run: a server that went away while it made a run is asked for it before another is made."""


class TrackedRun:
    """One MLflow run. As a context manager it is finished at the end, if it is not yet: FAILED on an error, KILLED on an interrupt."""

    def __init__(self, outbox: Outbox, run_id: str, *, clock: Callable[[], float] = time.time) -> None:
        """Write to an existing run.

        Args:
            outbox: of the store that holds it.
            run_id: its id.
            clock: seconds since the epoch; gives metrics their timestamps.
        """
        self.run_id = run_id
        self._outbox = outbox
        self._clock = clock
        self._buffer: list[MetricPoint] = []
        self._buffered_since_s = 0.0
        self._not_finite: set[str] = set()
        self._finished = False

    def __enter__(self) -> Self:
        """Return the run itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Finish the run with the status that fits how the block ended, unless it is finished."""
        if self._finished:
            return
        if kind is None:
            self.finish("FINISHED")
        else:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")

    def log_params(self, settings: Mapping[str, object]) -> None:
        """Log nested settings as parameters `a.b.c`; values over 500 characters are cut."""
        params = tuple(flatten(settings).items())
        for start in range(0, len(params), MAX_PARAMS_PER_WRITE):
            self._put("logging parameters of", params=params[start : start + MAX_PARAMS_PER_WRITE])

    def log_metrics(self, step: int, values: Mapping[str, float], *, at_s: float | None = None) -> None:
        """Buffer metrics of one step; they are written when the buffer is full or old, by `flush` and by `finish`.

        NaN and infinity are not stored, because a store clamps or refuses them: the first of each name is kept as a tag
        `nonfinite.<name>`.

        Args:
            step: optimizer step, or any other counter that orders the points.
            values: metric name to value.
            at_s: when it was measured, seconds since the epoch; now by default.
        """
        now = self._clock()
        good, bad = finite(values)
        timestamp_ms = round((now if at_s is None else at_s) * 1000)
        if not self._buffer:
            self._buffered_since_s = now
        self._buffer += [(legal_key(name), value, timestamp_ms, step) for name, value in good.items()]
        new = {name: value for name, value in bad.items() if name not in self._not_finite}
        if new:
            self._not_finite |= new.keys()
            self.set_tags({f"nonfinite.{name}": f"{value} at step {step}" for name, value in new.items()})
        if len(self._buffer) >= MAX_METRICS_PER_WRITE or now - self._buffered_since_s >= FLUSH_AFTER_S:
            self.flush()

    def flush(self) -> None:
        """Write every buffered metric."""
        while self._buffer:
            points = tuple(self._buffer[:MAX_METRICS_PER_WRITE])
            del self._buffer[:MAX_METRICS_PER_WRITE]
            self._put("logging metrics of", metrics=points)

    def log_artifact(self, file: Path, folder: str = "") -> None:
        """Keep a copy of a local file, under `folder` of the run's artifacts."""
        self._put(f"storing {file.name} in", file, file=file.name, folder=folder)

    def log_text(self, text: str, name: str) -> None:
        """Keep a text as the artifact file `name`."""
        folder, _, file = name.rpartition("/")
        self._put(f"storing {name} in", text.encode(), file=file, folder=folder)

    def log_dict(self, value: object, name: str) -> None:
        """Keep a JSON-able value as the artifact file `name`."""
        self.log_text(json.dumps(value, indent=2, default=str) + "\n", name)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Set tags, replacing those of the same name."""
        pairs = tuple((legal_key(name), str(value)[:MAX_TAG_CHARS]) for name, value in tags.items())
        for start in range(0, len(pairs), MAX_PARAMS_PER_WRITE):
            self._put("setting tags of", tags=pairs[start : start + MAX_PARAMS_PER_WRITE])

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
        self._put("closing", status=status, end_ms=round(self._clock() * 1000))
        self._finished = True

    def _put(self, doing: str, source: Path | bytes | None = None, **content: Any) -> None:
        self._outbox.put(Operation(run_id=self.run_id, doing=f"{doing} run {self.run_id}", **content), source)


class Tracker:
    """The experiment of one recipe: starts pipeline runs and, nested in them, stage runs.

    As a context manager it sees at the end to what a server that was away has not got yet.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        *,
        artifact_root: str | None = None,
        journals: Path | None = None,
        clock: Callable[[], float] = time.time,
        tell: Callable[[str], None] | None = None,
        patience: Patience | None = None,
    ) -> None:
        """Connect, send what earlier processes have left, and make the experiment if it is new.

        Args:
            uri: tracking URI, see `store.default_uri`.
            experiment: its name.
            artifact_root: URL under which a new experiment keeps its files, see `store.default_artifact_root`; a server decides
                this by itself, so it is not passed on to one.
            journals: folder that keeps what the server has not got yet, see `journal.outbox_folder`; None loses it with this process.
            clock: seconds since the epoch.
            tell: shows the user a line: that the server is away, and that it is back; the log's warnings by default.
            patience: how long is waited for what.

        Raises:
            UserError: if the URI does not answer now, or the experiment was deleted.
        """
        self.uri = uri
        self._client = connect(uri)
        self._clock, self._journals = clock, journals
        self._tell = tell or logging.getLogger(__name__).warning
        self._outbox = self._open_outbox(patience)
        location = None if artifact_root is None or uri.startswith("http") else f"{artifact_root.rstrip('/')}/{legal_key(experiment)}"
        self.experiment_id = str(self._outbox.ask(f"opening experiment {experiment!r}", lambda: self._experiment(experiment, location)))

    def __enter__(self) -> Self:
        """Return the tracker itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Wait for a server that is away, after a failure only for a moment, and say where what it has not got is kept."""
        folders = self._outbox.folders
        if folders and kind is None:
            self._tell(f"MLflow at {self._outbox.uri}: {self._outbox.waiting} writes are still to be sent; waiting up to {CLOSE_S:.0f} s")
        left = self._outbox.close(CLOSE_S if kind is None else CLOSE_AFTER_FAILURE_S)
        if left:
            where = "are lost" if self._journals is None else f"are kept in {self._journals}"
            self._tell(
                f"MLflow at {self._outbox.uri} has not got {left} writes, which {where}; fix: `linearsr tracking flush` once it is back"
            )

    @property
    def client(self) -> "MlflowClient":
        """The client for everything else; waits until the server answers and has all that was logged before."""
        self._outbox.ask("asking MLflow", self._ping)
        return self._client

    def _open_outbox(self, patience: Patience | None) -> Outbox:
        """Return an outbox that has taken over what earlier processes left in the folder of the journals."""
        folder = self._journals
        if folder is None:
            self._scratch = TemporaryDirectory(prefix="linearsr-outbox-")
            folder = Path(self._scratch.name)
        outbox = Outbox(
            without_password(self.uri),
            folder,
            send=lambda operation, file: send(self._client, operation, file),
            probe=lambda: answers(self.uri),
            tell=self._tell,
            patience=patience,
        )
        left = outbox.adopt(Journal.orphans(folder))
        if left:
            self._tell(f"MLflow at {outbox.uri} gets {left} writes that an earlier run left behind")
        return outbox

    def _ping(self) -> None:
        if not answers(self.uri):
            raise ConnectionError("no answer")

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
        found = self._find(f"tags.`{PARENT_TAG}` = '{parent_id}' and tags.stage = '{stage}'", f"looking for run {stage!r}")
        return TrackedRun(self._outbox, found, clock=self._clock) if found else None

    def resume(self, run_id: str) -> TrackedRun | None:
        """Open an existing run again; it counts as running until it is finished. None if the store has none, or it was deleted."""
        found = self._outbox.ask(f"opening run {run_id} again", lambda: self._open_again(run_id))
        return TrackedRun(self._outbox, run_id, clock=self._clock) if found else None

    def _open_again(self, run_id: str) -> bool:
        """Mark a run as running; False if there is none to be marked."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if is_transient(error) or self._has(run_id):
                raise
            return False
        return True

    def _has(self, run_id: str) -> bool:
        """Tell whether the store has a run that was not deleted."""
        from mlflow.exceptions import MlflowException

        try:
            return str(self._client.get_run(run_id).info.lifecycle_stage) == "active"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def _start(self, name: str, tags: Mapping[str, object], params: Mapping[str, object]) -> TrackedRun:
        """Create a run with tags and parameters."""
        word, tried = uuid4().hex, False
        all_tags = {legal_key(key): str(value)[:MAX_TAG_CHARS] for key, value in {**tags, START_TAG: word}.items()}

        def create() -> str:
            nonlocal tried
            found = self._search(f"tags.`{START_TAG}` = '{word}'") if tried else None
            tried = True
            return found or str(self._client.create_run(self.experiment_id, run_name=name, tags=all_tags).info.run_id)

        run = TrackedRun(self._outbox, str(self._outbox.ask(f"starting run {name!r}", create)), clock=self._clock)
        run.log_params(params)
        return run

    def _find(self, condition: str, doing: str) -> str | None:
        found = self._outbox.ask(doing, lambda: self._search(condition))
        return None if found is None else str(found)

    def _search(self, condition: str) -> str | None:
        """Return the id of a run of which a condition holds."""
        found = self._client.search_runs([self.experiment_id], filter_string=condition, max_results=1)
        return str(found[0].info.run_id) if found else None

    def _experiment(self, name: str, location: str | None) -> str:
        """Return the id of an experiment, made if new; another process may make it at the same time."""
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=location))
            except MlflowException:
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise UserError(
                f"tracking.experiment: got {name!r}; expected an experiment that was not deleted; "
                f"fix: `mlflow experiments restore --experiment-id {found.experiment_id}`, or choose another name"
            )
        return str(found.experiment_id)
