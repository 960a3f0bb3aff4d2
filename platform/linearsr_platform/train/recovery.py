"""Back to the last good state without a restart: restore points, the way back, and what was wrong.

Only weights, moments and average go back. The streams of data and noise go on where they are, so what came between restore point and
trip is skipped, and a batch or a draw that did harm is not met again before the next epoch. Restore points are in host memory: together
32 bytes a parameter, shared out over the workers.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from linearsr.guard import AttentionReading, Fault, Guard, StepReading, Trip, lr_scale, number_in_series
from linearsr_platform.errors import StageError
from linearsr_platform.recipe.train_schema import TrainConfig
from linearsr_platform.train.checkpoint import LoopState
from linearsr_platform.train.diagnosis import Finding, Sightings, bad_weights, first_not_finite, first_standing_out, grown_weights
from linearsr_platform.train.ema import ExponentialAverage
from linearsr_platform.train.processes import collect, sum_over_workers, world_size
from linearsr_platform.train.protocols import Batch, Engine
from linearsr_platform.train.results import Sighting

POINTS = 2
"""Restore points kept: the newest may have been taken between a fault's slow onset and its detection."""
RECORD_BYTES = 256 * 2**20
"""Batches kept on a worker for taking a bad step again."""
NOT_REPRODUCED = "not reproduced on replay"


class TrainingDiverged(StageError):
    """Training stopped being sound, and rollbacks were not allowed or did not help."""


@dataclass(frozen=True, slots=True)
class _Point:
    """This worker's share of a good state, in host memory."""

    step: int
    train_seconds: float
    engine: object
    average: list[Tensor]


@dataclass(frozen=True, slots=True)
class _Record:
    """What a step was taken with."""

    step: int
    batches: list[Batch]
    generator: Tensor
    """State of the noise generator before it."""

    @property
    def num_bytes(self) -> int:
        return sum(value.nbytes for batch in self.batches for value in batch.values())


@dataclass(frozen=True, slots=True)
class _Replay:
    """What a step gave when it was taken again from the restore point; the same on every worker."""

    loss: float
    grad_norm: float
    sightings: Sightings


class Recovery:
    """Watches training with the guard and takes it back. Every worker has one, and all of them decide alike."""

    def __init__(self, engine: Engine, average: ExponentialAverage, config: TrainConfig) -> None:
        """Watch from a fresh or resumed state; `remember` takes the first restore point."""
        self._engine, self._average, self._config = engine, average, config.guard
        self._parts = world_size() * config.accumulation
        self._guard = Guard(config.guard)
        self._points: deque[_Point] = deque(maxlen=POINTS)
        self._records: deque[_Record] = deque()
        self._bytes = 0
        self._norms: dict[str, float] = {}

    def resume(self, state: LoopState) -> None:
        """Watch on with the limits that there were when `state` was saved."""
        if self._config.enabled and state.guard:
            self._guard.restore(state.guard)

    def guard_state(self) -> dict[str, Any]:
        """Return what the guard remembers, for `LoopState`."""
        return self._guard.state() if self._config.enabled else {}

    def lr_scale(self, state: LoopState, step: int) -> float:
        """Return the factor on the learning rate of the update that follows `step` earlier ones."""
        return lr_scale(self._config, state.trips, step)

    def loss_limit(self, state: LoopState) -> float | None:
        """Return the loss above which micro-batches are left out, once a trip has shown that there is bad data; else None."""
        return self._guard.loss_limit(self._parts) if any(trip.bad_data for trip in state.trips) else None

    def record(self, step: int, batches: list[Batch]) -> None:
        """Keep what step number `step` is about to be taken with; the oldest go when they take too much memory."""
        if not self._config.enabled:
            return
        self._records.append(_Record(step, batches, self._engine.generator.get_state()))
        self._bytes += self._records[-1].num_bytes
        while self._bytes > RECORD_BYTES or len(self._records) > self._config.history:
            self._bytes -= self._records.popleft().num_bytes

    def remember(self, state: LoopState) -> None:
        """Take a restore point, if the present state is good and the last one is some way back; the first one in any case."""
        if not self._config.enabled:
            return
        # A run that goes on from a checkpoint has nothing else to go back to.
        if self._points and (not self._guard.calm or state.step - self._points[-1].step < self._config.window):
            return
        if len(self._points) < POINTS:
            average = [tensor.detach().to("cpu", copy=True) for tensor in self._average.tensors()]
            self._points.append(_Point(state.step, state.train_seconds, self._engine.capture(), average))
            return
        oldest = self._points.popleft()
        for kept, tensor in zip(oldest.average, self._average.tensors(), strict=True):
            kept.copy_(tensor)
        self._points.append(_Point(state.step, state.train_seconds, self._engine.capture(oldest.engine), oldest.average))

    def check_steps(self, steps: Sequence[StepReading], attention_step: int, attention: Sequence[AttentionReading]) -> Fault | None:
        """Look at the steps and attentions of a window; returns what is wrong first. Sound steps are not kept for a replay."""
        fault = self._guard.observe(steps)
        if not self._config.enabled:
            return fault
        inside = self._guard.observe_attention(attention_step, steps[-1].step, attention)
        if fault is None or (inside is not None and inside.step <= fault.step):
            fault = inside or fault
        if fault is not None:
            self._norms = shared_norms(self._engine.full_weights())
        elif self._guard.calm:
            # The last one stays, as the sound step that a bad one of the next window is compared with.
            while len(self._records) > 1:
                self._records.popleft()
            self._bytes = sum(record.num_bytes for record in self._records)
        return fault

    def check_validation(self, step: int, values: Mapping[str, float], weights: Mapping[str, Tensor]) -> Fault | None:
        """Look at a validation of `weights`, which only worker 0 has; returns what is wrong first."""
        fault = self._guard.observe_validation(step, values)
        if fault is not None and self._config.enabled:
            self._norms = shared_norms(weights)
        return fault

    def recover(self, fault: Fault, state: LoopState) -> Trip:
        """Go back to the last good state, find out what was wrong, and note it in `state`. Every worker calls it.

        Args:
            fault: what a check has just returned.
            state: of the loop; its step, history and trips are changed.

        Raises:
            TrainingDiverged: if there is nothing to go back to.
        """
        if not self._config.enabled or not self._points:
            raise diverged(fault)
        point = self._choose(fault)
        generator = self._engine.generator.get_state()
        self._restore(point)
        finding, bad_data = self._diagnose(fault, point)
        self._engine.generator.set_state(generator)
        trip = replace(self._trip(fault, finding, state, point), bad_data=bad_data)
        state.trips.append(trip)
        state.step, state.train_seconds = point.step, point.train_seconds
        state.history = [entry for entry in state.history if entry["step"] <= point.step]
        self._guard.rolled_back(point.step)
        self._records.clear()
        self._bytes = 0
        return trip

    def _choose(self, fault: Fault) -> _Point:
        """Return the newest restore point before the fault, and drop those after it.

        A number that is too large had its onset before it passed its limit; one that is not finite had not, it comes in one step.
        """
        latest = fault.step - 1 - (self._config.window if fault.finite else 0)
        while len(self._points) > 1 and self._points[-1].step > latest:
            self._points.pop()
        return self._points[-1]

    def _restore(self, point: _Point) -> None:
        self._engine.restore(point.engine)
        self._average.restore(point.average)

    def _trip(self, fault: Fault, finding: Finding, state: LoopState, point: _Point) -> Trip:
        number = number_in_series(self._config, state.trips, fault.step)
        return Trip(
            step=fault.step,
            detected_at=fault.detected_at,
            statistic=fault.statistic,
            value=f"{fault.value:.4g}",
            limit="a finite number" if fault.limit is None else f"at most {fault.limit:.4g}",
            layer=finding.layer,
            evidence=finding.evidence,
            bad_data=False,
            action="stopped" if number > self._config.max_rollbacks else "rolled back",
            rolled_back_to=point.step,
            lr_scale=lr_scale(self._config, state.trips, fault.step - 1) * self._config.lr_cut,
            number=number,
        )

    def _diagnose(self, fault: Fault, point: _Point) -> tuple[Finding, bool]:
        """Return where the fault was first seen, and whether it is the data's; the engine is at `point` before and after."""
        bad, sound = self._replays(fault, point)
        spoilt = bad_weights(self._norms)
        found = None if bad is None else first_not_finite(bad.sightings)
        if found is not None and not fault.finite:
            return found, False
        if bad is not None and self._again(fault, bad):
            healthy = sound is not None and not self._again(fault, sound)
            standing_out = found or first_standing_out(bad.sightings, sound.sightings if sound is not None and healthy else None)
            return standing_out or Finding(None, "came back on replay, on sound weights, and no layer stands out"), healthy
        known = Finding(fault.layer, f"{fault.statistic} of {fault.layer} on worker {fault.worker}") if fault.layer is not None else spoilt
        said = NOT_REPRODUCED if bad is not None else "its batches were not kept for a replay"
        grown = grown_weights(self._norms, shared_norms(self._engine.full_weights()))
        parts = [*([known.evidence] if known is not None else []), *([grown] if grown else []), said]
        return Finding(None if known is None else known.layer, ", ".join(parts)), False

    def _replays(self, fault: Fault, point: _Point) -> tuple[_Replay | None, _Replay | None]:
        """Take the bad step and the last sound one before it again, where every worker has kept what they were taken with."""
        own = {record.step: record for record in self._records}
        kept = set.intersection(*cast("list[set[int]]", collect(set(own))))
        before = max((step for step in kept if step < fault.step), default=None)
        bad = self._replay(own[fault.step], point) if fault.step in kept else None
        return bad, None if bad is None or before is None else self._replay(own[before], point)

    def _replay(self, record: _Record, point: _Point) -> _Replay:
        self._engine.generator.set_state(record.generator)
        result, sightings = self._engine.examine(record.batches)
        loss = sum_over_workers(result.loss.detach().double().reshape(1).clone()).item() / world_size()
        self._engine.restore(point.engine)
        return _Replay(loss, float(result.grad_norm), cast("list[list[Sighting]]", collect(sightings)))

    def _again(self, fault: Fault, replay: _Replay) -> bool:
        """Tell whether a number that was too large was so again."""
        if fault.limit is None or fault.statistic not in ("loss", "gradient norm"):
            return False
        return (replay.loss if fault.statistic == "loss" else replay.grad_norm) > fault.limit


def shared_norms(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Return worker 0's norms of weights, by name in network order, on every worker; NaN and infinity stay what they are."""
    own = torch.stack([weight.float().norm() for weight in weights.values()]).tolist() if weights else []
    return cast("dict[str, float]", collect(dict(zip(weights, own, strict=True)))[0])


def diverged(fault: Fault) -> TrainingDiverged:
    """Return the error for a fault that nothing can be done about."""
    where = fault.statistic if fault.statistic.startswith("validation") else "train"
    return TrainingDiverged(f"{where} step {fault.step}: {fault.describe()}; fix: {_hint([])}")


def gave_up(trips: Sequence[Trip]) -> TrainingDiverged:
    """Return the error that tells the whole series of trips of which the last one ended training."""
    last = trips[-1]
    series = list(trips[-last.number :])
    first = next((trip for trip in series if trip.layer is not None), series[0])
    told = "; ".join(f"({trip.number}) {trip.describe()}" for trip in series)
    return TrainingDiverged(
        f"train step {last.step}: got {last.statistic} {last.value}, trip {last.number} of the guard in a row; expected {last.limit}, "
        f"and at most {last.number - 1} rollbacks (guard.max_rollbacks); first seen bad: {first.evidence}; trips: {told}; "
        f"fix: {_hint(series)}"
    )


def _hint(series: Sequence[Trip]) -> str:
    """Say what usually helps."""
    if any(trip.bad_data for trip in series):
        return "look at the training images, or lower train.lr"
    if series and all(trip.layer is not None and trip.limit == "a finite number" for trip in series):
        return f"look at {series[0].layer}: the same batch is bad there every time; lower train.lr, or train in float32"
    return "lower train.lr"
