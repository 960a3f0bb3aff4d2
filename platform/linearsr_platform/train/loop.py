"""The one training loop. Free of Ray and DeepSpeed: it knows an engine, a stream of batches and an observer by their protocols.

Every worker runs it. All of them take the same branches, because every decision depends on numbers they share.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from time import monotonic

from linearsr.guard import Fault
from linearsr.knee import KneeDecision, KneeDetector
from linearsr.metric_table import metric_spec
from linearsr_platform import storage
from linearsr_platform.train.checkpoint import Checkpoints, LoopState
from linearsr_platform.train.ema import ExponentialAverage
from linearsr_platform.train.job import TrainJob
from linearsr_platform.train.outcome import StopReason, TrainOutcome
from linearsr_platform.train.processes import rank
from linearsr_platform.train.protocols import Batch, BatchSource, Engine, Observer
from linearsr_platform.train.recovery import Recovery, diverged, gave_up
from linearsr_platform.train.schedule import learning_rate
from linearsr_platform.train.snapshots import Snapshots
from linearsr_platform.train.validation import validate
from linearsr_platform.train.window import MetricWindow

OUTCOME_FILE = "outcome.json"
SNAPSHOT_FOLDER = "snapshots"


def run_training(
    engine: Engine,
    batches: BatchSource,
    validation: Sequence[Batch],
    job: TrainJob,
    observer: Observer,
    *,
    checkpoints: str | None = None,
    before: str | None = None,
    clock: Callable[[], float] = monotonic,
) -> TrainOutcome:
    """Train until the knee is confirmed, or the steps or seconds are used up. Called by every worker of the trainer.

    Writes `snapshots/` and, last, `outcome.json` under `job.output_url`.

    Args:
        engine: the network, freshly built.
        batches: this worker's micro-batches.
        validation: all validation batches, the same on every worker.
        job: what to do.
        observer: who is told.
        checkpoints: folder of the job's checkpoints. Training goes on from the newest that is whole; one of a finished run gives its
            outcome again. None keeps none.
        before: folder of another job's checkpoints to start from if there are none.
        clock: seconds that only ever rise.

    Returns:
        The outcome, the same on every worker but for times.

    Raises:
        ValueError: if there is nothing to validate on.
        TrainingDiverged: if the guard has tripped more often in a row than it may, or at all where it is off.
        StageError: if too many checkpoints in a row could not be written.
    """
    if not validation:
        raise ValueError(f"job {job.name}: got no validation batches; expected at least one; fix: raise data.validation_px")
    loop = _Loop(engine, batches, validation, job, observer, clock, checkpoints)
    try:
        loop.start(before)
        while True:
            while (reason := loop.stop_reason()) is None:
                loop.step()
            outcome = loop.finish(reason)
            if outcome is not None:
                return outcome
    finally:
        loop.close()


class _Loop:
    """The loop's parts and state."""

    def __init__(
        self,
        engine: Engine,
        batches: BatchSource,
        validation: Sequence[Batch],
        job: TrainJob,
        observer: Observer,
        clock: Callable[[], float],
        checkpoints: str | None,
    ) -> None:
        self._engine, self._batches, self._validation = engine, batches, validation
        self._job, self._observer, self._clock = job, observer, clock
        self._config = job.train
        self._outcome_url = storage.join(job.output_url, OUTCOME_FILE)
        self._average = ExponentialAverage(engine, job.train.ema_decay)
        self._window = MetricWindow(engine.attentions)
        self._recovery = Recovery(engine, self._average, job.train)
        self._state = LoopState()
        self._snapshots: Snapshots
        self._metrics: dict[str, float] = {}
        self._saved_step: int | None = None
        self._checkpoints = None if checkpoints is None else self._open(checkpoints)
        self._watch_anew()

    def _open(self, url: str) -> Checkpoints:
        return Checkpoints(
            url,
            self._engine,
            self._average,
            keep=self._config.keep_checkpoints,
            codec=self._job.codec_digest,
            seed=self._job.seed,
            on_complete=self._on_complete,
            on_message=self._on_message,
        )

    def close(self) -> None:
        """Wait for what is still being written."""
        if self._checkpoints is not None:
            self._checkpoints.close()

    def _watch_anew(self) -> None:
        """Start with a detector that has seen nothing."""
        knee = self._config.knee
        orientations = {name: metric_spec(name).higher_is_better for name in knee.metrics}
        self._detector = KneeDetector(orientations, patience=knee.patience, min_points=knee.min_points)
        self._decision: KneeDecision

    def start(self, before: str | None) -> None:
        """Restore a checkpoint, or take the baseline validation of a fresh run."""
        resumed, said = (None, []) if self._checkpoints is None else self._checkpoints.restore(self._batches, before=before)
        if resumed is not None:
            self._state, self._saved_step = resumed, resumed.step
            self._recovery.resume(resumed)
        if rank() == 0:
            self._observer.on_start(self._state.step)
        for text in said:
            self._on_message(text)
        # Seconds that earlier attempts spent count as if this one had started that much sooner.
        self._started = self._clock() - self._state.seconds
        if rank() == 0:
            storage.remove(self._outcome_url)
        url = storage.join(self._job.output_url, SNAPSHOT_FOLDER)
        last_step = None if resumed is None else self._state.step
        self._snapshots = Snapshots(url, self._config.knee.keep, last_step=last_step, codec=self._job.codec_digest)
        for point in self._state.history:
            self._decide(point)
        if not self._state.history and (fault := self._validate()) is not None:
            # Before the first step there is nothing to go back to.
            raise diverged(fault)
        self._recovery.remember(self._state)
        self._mark = self._clock()

    def stop_reason(self) -> StopReason | None:
        """Say whether and why training is over."""
        if self._config.knee.stop and self._decision.final:
            return "knee"
        if self._state.step >= self._config.max_steps:
            return "max_steps"
        if self._config.max_seconds is not None and self._state.seconds >= self._config.max_seconds:
            return "max_seconds"
        return None

    def step(self) -> None:
        """Move the weights once, and log, validate and checkpoint where it is due; go back if something is wrong."""
        config, state, recovery = self._config, self._state, self._recovery
        batches = list(islice(self._batches, config.accumulation))
        recovery.record(state.step + 1, batches)
        # Looking into the attentions costs, so it is done in the first step of a window only.
        probe = config.guard.enabled and len(self._window) == 0
        result = self._engine.train_step(batches, self._lr(state.step), probe=probe, loss_limit=recovery.loss_limit(state))
        state.step += 1
        self._average.update(state.step)
        self._window.add(result)
        validation_due = state.step % config.validate_every == 0
        checkpoint_due = state.step % config.checkpoint_every == 0
        # What was not logged is not checked either, and neither snapshot nor checkpoint may hold a diverged network.
        fault: Fault | None = None
        if state.step % config.log_every == 0 or validation_due or checkpoint_due or state.step == config.max_steps:
            fault = self._log()
        if fault is None and validation_due:
            fault = self._validate()
        if fault is not None:
            self._recover(fault)
        elif checkpoint_due:
            recovery.remember(state)
            self._checkpoint()

    def finish(self, reason: StopReason) -> TrainOutcome | None:
        """Validate and save the last weights if that has not happened, and write the outcome; None if training had to go back."""
        state = self._state
        if state.history[-1]["step"] != state.step and (fault := self._validate()) is not None:
            self._recover(fault)
            return None
        if self._saved_step != state.step:
            self._checkpoint()
        best = self._detector.best_step()
        knee_step = None if best is None else self._snapshots.nearest(best)
        if self._checkpoints is not None:
            self._checkpoints.settle(wait_for_it=True)
        outcome = TrainOutcome(
            steps=state.step,
            stopped_by=reason,
            knee_step=knee_step,
            knee_weights=self._snapshots.url(state.step if knee_step is None else knee_step),
            last_weights=self._snapshots.url(state.step),
            decision=self._detector.conclude().to_json(),
            history=state.history,
            seconds=self._clock() - self._started,
            samples_per_s=state.step * self._config.batch_size / max(state.train_seconds, 1e-9),
            trips=[trip.to_json() for trip in state.trips],
            messages=state.messages,
        )
        if rank() == 0:
            storage.write_json(self._outcome_url, outcome.to_json())
        return outcome

    def _lr(self, step: int) -> float:
        return learning_rate(step, self._config) * self._recovery.lr_scale(self._state, step)

    def _log(self) -> Fault | None:
        state, steps = self._state, len(self._window)
        flushed = self._window.flush(state.step, self._clock() - self._started)
        state.seconds = flushed.seconds
        now = self._clock()
        state.train_seconds += now - self._mark
        fault = self._recovery.check_steps(flushed.steps, flushed.attention_step, flushed.attention)
        if fault is not None:
            return fault
        self._metrics = {
            **flushed.values,
            "lr": self._lr(state.step - 1),
            "samples_per_s": steps * self._config.batch_size / max(now - self._mark, 1e-9),
            "seconds": state.seconds,
        }
        self._mark = now
        if rank() == 0:
            self._observer.on_metrics(state.step, self._metrics)
        if self._checkpoints is not None:
            # Here and not in every step, because the workers wait for each other to say how far they are.
            self._checkpoints.settle(wait_for_it=False)
        return None

    def _validate(self) -> Fault | None:
        step = self._state.step
        with self._average.swapped():
            values = validate(self._engine, self._validation)
            weights = self._engine.full_weights()
        fault = self._recovery.check_validation(step, values, weights)
        if fault is not None:
            return fault
        self._snapshots.write(step, weights)
        point = {"step": step, **values}
        self._state.history.append(point)
        self._decide(point)
        self._snapshots.prune(self._detector.candidates(self._config.knee.keep))
        if rank() == 0:
            self._observer.on_validation(step, values, self._decision)
        self._mark = self._clock()
        return None

    def _recover(self, fault: Fault) -> None:
        """Go back to the last good state, or end training if that was tried often enough."""
        state = self._state
        trip = self._recovery.recover(fault, state)
        self._observer.on_trip(state.step, trip)
        if trip.action == "stopped":
            raise gave_up(state.trips)
        self._snapshots.drop_after(state.step)
        self._watch_anew()
        for point in state.history:
            self._decide(point)
        # A worker that dies now must come back to here and not to what was undone.
        self._checkpoint()

    def _decide(self, point: dict[str, float]) -> None:
        self._decision = self._detector.update(int(point["step"]), {name: point[name] for name in self._config.knee.metrics})

    def _checkpoint(self) -> None:
        self._saved_step = self._state.step
        if self._checkpoints is not None:
            self._state.guard = self._recovery.guard_state()
            self._checkpoints.save(self._state, self._batches)
        self._mark = self._clock()

    def _on_complete(self, step: int) -> None:
        if rank() == 0:
            self._observer.on_checkpoint(step)

    def _on_message(self, text: str) -> None:
        self._state.messages.append(text)
        if rank() == 0:
            self._observer.on_message(self._state.step, text)
