"""When training goes wrong, and how often it may start over: the policy, without network, workers or files. Imports no torch.

Non-finite numbers trip at once. A loss or gradient norm far above its own history trips where it happens again and again, or where
it is so far above that once is enough. Every worker feeds the same numbers and so comes to the same decision.
Source: method.md 2.4 and 4.8 (robust z of the loss, ratio of the gradient norm, sentinel of the attention, PaLM's rollback).
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite, sqrt
from statistics import median
from typing import Any, Literal

from linearsr.config import require

_SIGMA_PER_MAD = 1.4826  # A normal distribution's standard deviation over its median absolute deviation.


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """When the guard trips, and what it may do then."""

    enabled: bool = True
    """Off: the first loss, gradient or metric that is not finite ends training, and nothing else is looked at."""
    max_rollbacks: int = 3
    """Rollbacks in one series; the next trip ends training."""
    lr_cut: float = 0.5
    """Factor on the learning rate after a rollback."""
    lr_recovery: int = 50
    """Steps over which the rate climbs back. A fault in a run of 600 steps cost 2 to 4 % of validation loss with 200, up to 2 with 100."""
    forgive_after: int = 1000
    """Steps without a trip after which the next one counts as the first of a new series."""
    history: int = 512
    """Sound steps that limits are computed from, at most. method.md 4.8."""
    min_history: int = 50
    """Sound steps before there are limits; until then only numbers that are not finite trip."""
    window: int = 20
    """Steps within which `strikes` of them over a limit trip."""
    strikes: int = 3
    loss_deviations: float = 8.0
    """Limit of the loss: its median plus this many robust standard deviations, 1.4826 MAD."""
    loss_surge: float = 50.0
    """Multiple of the median loss that trips at once."""
    norm_factor: float = 10.0
    """Limit of the gradient norm before clipping: this multiple of its median."""
    max_activation: float = 1e4
    """Largest input of a linear attention that is still sound. method.md 4.8; float16 ends at 65504."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.max_rollbacks >= 0, "guard.max_rollbacks", self.max_rollbacks, "0 or more")
        require(0 < self.lr_cut <= 1, "guard.lr_cut", self.lr_cut, "a number in (0, 1]")
        for name in ("forgive_after", "lr_recovery", "strikes", "min_history"):
            require(getattr(self, name) >= 1, f"guard.{name}", getattr(self, name), "a positive integer")
        require(self.window >= self.strikes, "guard.window", self.window, f"at least guard.strikes, {self.strikes}")
        require(self.history >= self.min_history, "guard.history", self.history, f"at least guard.min_history, {self.min_history}")
        for name in ("loss_surge", "norm_factor"):
            require(getattr(self, name) > 1, f"guard.{name}", getattr(self, name), "a number above 1")
        for name in ("loss_deviations", "max_activation"):
            require(getattr(self, name) > 0, f"guard.{name}", getattr(self, name), "a positive number")


@dataclass(frozen=True, slots=True)
class StepReading:
    """What the guard sees of one optimizer step; the same on every worker."""

    step: int
    loss: float
    """Mean over all workers."""
    grad_norm: float
    """Of the whole gradient before clipping; negative where the engine marks it as not finite."""
    screened: bool = False
    """Whether a part of it was left out for its loss; neither a strike nor part of the history."""


@dataclass(frozen=True, slots=True)
class AttentionReading:
    """The state of one linear attention on one worker in one step."""

    layer: str
    worker: int
    normaliser: float
    """Smallest of a query that has one; infinite if none has."""
    dead: float
    """Share of queries whose normaliser is 0, [0, 1]."""
    magnitude: float
    """Largest |x| of its input."""
    largest: float
    """Largest normaliser."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A statistic that is not sound."""

    step: int
    """First step at which it was bad."""
    detected_at: int
    statistic: str
    """`loss`, `gradient norm`, `normaliser`, `activation`, `share of screened steps`, or `validation NAME`."""
    value: float
    limit: float | None = None
    """What it would have to stay under; None: finite."""
    layer: str | None = None
    """Where, if the statistic is of one layer."""
    worker: int | None = None

    @property
    def finite(self) -> bool:
        """Whether the statistic is a number, only too large."""
        return self.limit is not None

    def describe(self) -> str:
        """Say what was seen and what would be right."""
        where = f" of {self.layer} on worker {self.worker}" if self.layer is not None else ""
        rule = "a finite number" if self.limit is None else f"at most {self.limit:.4g}"
        return f"got {self.statistic}{where} {self.value:.4g}; expected {rule}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Trip:
    """One trip of the guard and what followed; JSON."""

    step: int
    """First bad step."""
    detected_at: int
    statistic: str
    value: str
    """What it was; a text, because JSON knows neither NaN nor infinity."""
    limit: str
    """What it should have been."""
    layer: str | None
    """Part of the network that was first seen bad; None if none stands out."""
    evidence: str
    """What was seen there, or that it did not come back."""
    bad_data: bool
    """Whether sound weights did as badly on the same data: then batches like it are left out from now on."""
    action: Literal["rolled back", "stopped"]
    rolled_back_to: int
    """Step that training went back to; where it stopped, the step it would have gone back to."""
    lr_scale: float
    """Factor on the learning rate right after."""
    number: int
    """In its series, from 1."""

    def describe(self) -> str:
        """Return one sentence about it."""
        seen = f"step {self.step}: {self.statistic} {self.value}, expected {self.limit} (seen at {self.detected_at}); {self.evidence}"
        if self.action == "stopped":
            return f"{seen}; stopped"
        screened = ", batches like it are left out" if self.bad_data else ""
        return f"{seen}; back to step {self.rolled_back_to}, learning rate x{self.lr_scale:.3g}{screened}"

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


class Guard:
    """Watches steps, attentions and validations, and says what is not sound."""

    def __init__(self, config: GuardConfig) -> None:
        """Start without a history."""
        self._config = config
        self._sound: deque[StepReading] = deque(maxlen=config.history)
        self._strikes: dict[str, deque[tuple[int, float]]] = {"loss": deque(), "gradient norm": deque()}
        self._screened: deque[bool] = deque(maxlen=config.history)
        self._limits: dict[str, float] | None = None

    @property
    def calm(self) -> bool:
        """Whether no recent step was over a limit, so that the present weights may be gone back to."""
        return not any(self._strikes.values())

    def observe(self, readings: Sequence[StepReading]) -> Fault | None:
        """Take the steps since the last call, in order; returns the first fault among them."""
        for reading in readings:
            fault = _not_finite(reading, readings[-1].step)
            if fault is not None:
                return fault
        if not self._config.enabled:
            return None
        limits = self._limits
        sound = []
        for reading in readings:
            fault = self._too_much_screened(reading, readings[-1].step)
            if fault is None and limits is not None:
                fault = self._strike(reading, limits, readings[-1].step)
            if fault is not None:
                return fault
            if not reading.screened and all(not queue or queue[-1][0] != reading.step for queue in self._strikes.values()):
                sound.append(reading)
        self._sound += sound
        self._limits = self._new_limits()
        return None

    def observe_attention(self, step: int, detected_at: int, readings: Iterable[AttentionReading]) -> Fault | None:
        """Take the linear attentions of one step; returns the first fault, in network order."""
        limit = self._config.max_activation
        for reading in readings:
            if not isfinite(reading.magnitude):
                return Fault(step, detected_at, "activation", reading.magnitude, None, reading.layer, reading.worker)
            if not isfinite(reading.largest):
                return Fault(step, detected_at, "normaliser", reading.largest, None, reading.layer, reading.worker)
            if reading.magnitude > limit:
                return Fault(step, detected_at, "activation", reading.magnitude, limit, reading.layer, reading.worker)
        return None

    def observe_validation(self, step: int, values: Mapping[str, float]) -> Fault | None:
        """Take a validation; returns the first metric that is not a finite number."""
        for name, value in values.items():
            if not isfinite(value):
                return Fault(step, step, f"validation {name}", value)
        return None

    def loss_limit(self, parts: int = 1) -> float | None:
        """Return the largest sound loss of one of `parts` equal parts of a step; None while there is no history.

        A part is that much noisier than the mean of all: its spread is sqrt(parts) times theirs.
        """
        if self._limits is None:
            return None
        centre = self._limits["median loss"]
        return centre + (self._limits["loss"] - centre) * sqrt(parts)

    def state(self) -> dict[str, Any]:
        """Return what it remembers, as JSON, for a run that goes on from a checkpoint."""
        return {
            "sound": [[reading.step, reading.loss, reading.grad_norm] for reading in self._sound],
            "screened": list(self._screened),
            "strikes": {statistic: list(queue) for statistic, queue in self._strikes.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned; a guard that has seen nothing yet is meant."""
        self._sound += [StepReading(*reading) for reading in state["sound"]]
        self._screened += state["screened"]
        for statistic, queue in self._strikes.items():
            queue += [(step, value) for step, value in state["strikes"][statistic]]
        self._limits = self._new_limits()

    def rolled_back(self, step: int) -> None:
        """Forget the steps after `step`."""
        kept = [reading for reading in self._sound if reading.step <= step]
        self._sound = deque(kept, maxlen=self._config.history)
        self._limits = self._new_limits()
        self._screened.clear()
        for queue in self._strikes.values():
            queue.clear()

    def _too_much_screened(self, reading: StepReading, now: int) -> Fault | None:
        """Trip when more is left out than not: that is no bad data any more, and training stands still."""
        self._screened.append(reading.screened)
        share, limit = sum(self._screened) / self._config.history, 0.5
        return Fault(reading.step, now, "share of screened steps", share, limit) if share > limit else None

    def _strike(self, reading: StepReading, limits: Mapping[str, float], now: int) -> Fault | None:
        """Count a step that is over a limit; returns a fault once there are too many, or one is far over."""
        for statistic, value in (("loss", reading.loss), ("gradient norm", reading.grad_norm)):
            queue = self._strikes[statistic]
            while queue and queue[0][0] <= reading.step - self._config.window:
                queue.popleft()
            if reading.screened or value <= limits[statistic]:
                continue
            queue.append((reading.step, value))
            surge = limits["median loss"] * self._config.loss_surge
            if statistic == "loss" and value > max(surge, limits["loss"]):
                return Fault(reading.step, now, statistic, value, max(surge, limits["loss"]))
            if len(queue) >= self._config.strikes:
                return Fault(queue[0][0], now, statistic, queue[0][1], limits[statistic])
        return None

    def _new_limits(self) -> dict[str, float] | None:
        if len(self._sound) < self._config.min_history:
            return None
        losses = [reading.loss for reading in self._sound]
        centre = median(losses)
        deviation = _SIGMA_PER_MAD * median(abs(loss - centre) for loss in losses)
        return {
            "median loss": centre,
            "loss": centre + self._config.loss_deviations * deviation,
            "gradient norm": self._config.norm_factor * median(reading.grad_norm for reading in self._sound),
        }


def _not_finite(reading: StepReading, now: int) -> Fault | None:
    if not isfinite(reading.loss):
        return Fault(reading.step, now, "loss", reading.loss)
    if not isfinite(reading.grad_norm) or reading.grad_norm < 0:
        return Fault(reading.step, now, "gradient norm", reading.grad_norm)
    return None


def lr_scale(config: GuardConfig, trips: Sequence[Trip], step: int) -> float:
    """Return the factor on the learning rate of the update that follows `step` earlier ones.

    It climbs linearly from the last trip's to 1 over `lr_recovery` steps: a fault of the moment shall not slow down the rest
    of training, and a rate that is too high trips again on the way, in the same series.
    """
    if not trips:
        return 1.0
    start, since = trips[-1].lr_scale, step - trips[-1].rolled_back_to
    return start + (1 - start) * min(1.0, max(0, since) / config.lr_recovery)


def number_in_series(config: GuardConfig, trips: Sequence[Trip], step: int) -> int:
    """Return which trip of its series, from 1, one at `step` is: a series ends after `forgive_after` steps without."""
    if not trips or step - trips[-1].rolled_back_to > config.forgive_after:
        return 1
    return trips[-1].number + 1
