"""A worker that trains nothing and shows it."""

from itertools import count

import torch

from linearsr.guard import Trip
from linearsr.knee import KneeDecision
from linearsr_platform.cluster.gauges import MeteredBatches, MeteredObserver, TrainingGauges

TRIP = Trip(
    step=12, detected_at=15, statistic="loss", value="nan", limit="finite", layer=None, evidence="it did not come back", bad_data=False,
    action="rolled back", rolled_back_to=10, lr_scale=0.5, number=1,
)  # fmt: skip
PLATEAU = KneeDecision("plateau", 10, None, None, None, "two evaluations without a better one")


class Notes:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def on_start(self, step):
        self.told.append(("start", step))

    def on_metrics(self, step, values):
        self.told.append(("metrics", step))

    def on_validation(self, step, values, decision):
        self.told.append(("validation", step))

    def on_trip(self, step, trip):
        self.told.append(("trip", step))

    def on_checkpoint(self, step):
        self.told.append(("checkpoint", step))


class Stream:
    """Numbers as batches."""

    def __init__(self) -> None:
        self._numbers = iter(range(100))

    def __iter__(self):
        return self

    def __next__(self):
        return {"hr": torch.full((1,), float(next(self._numbers)))}

    def state(self):
        return {"at": 7}

    def restore(self, states):
        self._numbers = iter(range(states[0]["at"], 100))


class MeteredToy:
    """Goes through what a worker goes through, by a clock that moves one second a look."""

    def __init__(self, run: str, job: str) -> None:
        clock = map(float, count()).__next__
        gauges = TrainingGauges(run=run, job=job, rank=0)
        self._notes = Notes()
        self._observer = MeteredObserver(self._notes, gauges)
        self._batches = MeteredBatches(Stream(), gauges, clock=clock)

    def train(self) -> tuple[list[tuple[str, int]], list[float], dict[str, object]]:
        """Take three batches and tell the observer one thing of each kind; return what came through."""
        values = [float(next(self._batches)["hr"]) for _ in range(2)]
        self._batches.restore([{"at": 50}])
        values.append(float(next(self._batches)["hr"]))
        self._observer.on_start(5)
        self._observer.on_metrics(20, {"loss": 0.5, "grad_norm": 1.5, "lr": 1e-4, "samples_per_s": 12.5, "seconds": 9.0})
        self._observer.on_validation(20, {"psnr_y": 28.0}, PLATEAU)
        self._observer.on_trip(20, TRIP)
        self._observer.on_checkpoint(20)
        return self._notes.told, values, self._batches.state()
