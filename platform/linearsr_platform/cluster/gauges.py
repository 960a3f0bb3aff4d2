"""Training as Prometheus metrics: workers set them through Ray, whose agent on each node exposes them.

Ray puts `ray_` before the names here and `_total` behind those of counters, and adds labels of its own, such as `SessionName`.
`infra/monitoring` draws and watches them; a contract test compares the names.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, Literal, get_args

from ray.util.metrics import Counter, Gauge

from linearsr.guard import Trip
from linearsr.knee import KneeDecision, State
from linearsr_platform.train.protocols import Batch, BatchSource, Observer

LABELS = ("run", "job")
"""Of every metric: Ray Train's name of the run, which is the job's own, and the job's name (`pretrain`, `expert-1`)."""
NO_KNEE = -1.0
"""Value of the knee's step while there is none."""


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric as it is declared to Ray."""

    kind: Literal["gauge", "counter"]
    description: str
    labels: tuple[str, ...] = ()
    """Beside `LABELS`."""

    def exposed(self, name: str) -> str:
        """Return the name that Prometheus sees."""
        return f"ray_{name}" + ("_total" if self.kind == "counter" else "")


METRICS = {
    "linearsr_train_step": MetricSpec("gauge", "Optimizer steps taken, when metrics were last logged."),
    "linearsr_train_loss": MetricSpec("gauge", "Mean training loss of the steps since the last log."),
    "linearsr_train_grad_norm": MetricSpec("gauge", "Mean gradient norm of the steps since the last log, before clipping."),
    "linearsr_train_learning_rate": MetricSpec("gauge", "Learning rate of the last step."),
    "linearsr_train_samples_per_second": MetricSpec("gauge", "Samples of all workers a second, of the steps since the last log."),
    "linearsr_validation": MetricSpec("gauge", "Last validation, one series a metric.", ("metric",)),
    "linearsr_knee_state": MetricSpec("gauge", "1 for what the knee detector says, 0 for the other states.", ("state",)),
    "linearsr_knee_step": MetricSpec("gauge", "Step of the knee; -1 while there is none."),
    # No counter: Ray counters begin with their first increment, and `increase` does not see the step from nothing to one.
    "linearsr_guard_trips": MetricSpec("gauge", "Trips of the guard since these workers started."),
    "linearsr_checkpoint_step": MetricSpec("gauge", "Step that an interrupted run would go on from."),
    "linearsr_data_wait_seconds": MetricSpec("counter", "Seconds a worker waited for batches.", ("rank",)),
}
"""Every metric by the name that is given to Ray."""
LOGGED = {
    "linearsr_train_loss": "loss",
    "linearsr_train_grad_norm": "grad_norm",
    "linearsr_train_learning_rate": "lr",
    "linearsr_train_samples_per_second": "samples_per_s",
}
"""Gauges that take their value from what the loop logs."""


class TrainingGauges:
    """The metrics of one worker."""

    def __init__(self, *, run: str, job: str, rank: int) -> None:
        """Declare the metrics of a worker of `job`."""
        self._gauges = {name: Gauge(name, spec.description, LABELS + spec.labels) for name, spec in METRICS.items() if spec.kind == "gauge"}
        self._counters = {
            name: Counter(name, spec.description, LABELS + spec.labels) for name, spec in METRICS.items() if spec.kind == "counter"
        }
        self._labels = {"run": run, "job": job}
        self._rank = {**self._labels, "rank": str(rank)}
        self._trips = 0
        self._leads = rank == 0
        self.trips(0)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Show what the loop logged."""
        self._set("linearsr_train_step", step)
        for gauge, name in LOGGED.items():
            if name in values:
                self._set(gauge, values[name])

    def validation(self, values: Mapping[str, float], decision: KneeDecision) -> None:
        """Show a validation and the knee."""
        for name, value in values.items():
            self._set("linearsr_validation", value, metric=name)
        for state in get_args(State):
            self._set("linearsr_knee_state", float(state == decision.state), state=state)
        self._set("linearsr_knee_step", NO_KNEE if decision.knee_step is None else decision.knee_step)

    def trips(self, more: int) -> None:
        """Count trips of the guard. Every worker is told of each; worker 0 shows them."""
        self._trips += more
        if self._leads:
            self._set("linearsr_guard_trips", self._trips)

    def checkpoint(self, step: int) -> None:
        """Show from where an interrupted run would go on."""
        self._set("linearsr_checkpoint_step", step)

    def spent(self, counter: str, seconds: float) -> None:
        """Add seconds to a counter of this worker."""
        # Ray refuses an increment of nothing, and a coarse clock measures one.
        if seconds > 0:
            self._counters[counter].inc(seconds, self._rank)

    def _set(self, name: str, value: float, **labels: str) -> None:
        self._gauges[name].set(value, {**self._labels, **labels})


class MeteredObserver:
    """Shows what an observer is told; the other observer does the work."""

    def __init__(self, inner: Observer, gauges: TrainingGauges) -> None:
        """Pass everything on to `inner`."""
        self._inner = inner
        self._gauges = gauges

    def on_start(self, step: int) -> None:
        """Show and pass on that training begins; an interrupted run would go on from there."""
        self._gauges.checkpoint(step)
        self._inner.on_start(step)

    def on_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Show and pass on the metrics of the steps since the last call."""
        self._gauges.metrics(step, values)
        self._inner.on_metrics(step, values)

    def on_validation(self, step: int, values: Mapping[str, float], decision: KneeDecision) -> None:
        """Show and pass on a validation and what the knee detector made of it."""
        self._gauges.validation(values, decision)
        self._inner.on_validation(step, values, decision)

    def on_trip(self, step: int, trip: Trip) -> None:
        """Count and pass on a trip of the guard."""
        self._gauges.trips(1)
        self._inner.on_trip(step, trip)

    def on_checkpoint(self, step: int) -> None:
        """Show and pass on a checkpoint that is complete."""
        self._gauges.checkpoint(step)
        self._inner.on_checkpoint(step)

    def on_message(self, step: int, text: str) -> None:
        """Pass on what went wrong without stopping training."""
        self._inner.on_message(step, text)


class MeteredBatches:
    """Counts the seconds that training waits for each batch of another source."""

    def __init__(self, inner: BatchSource, gauges: TrainingGauges, *, clock: Callable[[], float] = monotonic) -> None:
        """Take batches from `inner`; `clock` is in seconds."""
        self._inner = inner
        self._gauges = gauges
        self._clock = clock

    def __iter__(self) -> "MeteredBatches":
        """Return itself."""
        return self

    def __next__(self) -> Batch:
        """Return the next micro-batch."""
        start = self._clock()
        batch = next(self._inner)
        self._gauges.spent("linearsr_data_wait_seconds", self._clock() - start)
        return batch

    def state(self) -> dict[str, object]:
        """Return where the other source is."""
        return self._inner.state()

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue the other source."""
        self._inner.restore(states)
