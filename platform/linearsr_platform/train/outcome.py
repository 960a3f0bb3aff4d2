"""What a finished trainer came to. Imports no torch."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

StopReason = Literal["knee", "max_steps", "max_seconds"]


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """What a finished trainer came to; written to `outcome.json`."""

    steps: int
    """Optimizer steps taken."""
    stopped_by: StopReason
    knee_step: int | None
    """Step of `knee_weights`: the knee, or where none was confirmed the earliest validation within noise of the best, or the kept
    snapshot nearest to it; None if there is none, the weights are then the last."""
    knee_weights: str
    """URL of the averaged weights that the next stage starts from."""
    last_weights: str
    """URL of the averaged weights at `steps`."""
    decision: dict[str, Any]
    """The detector's conclusion, a `KneeDecision`."""
    history: list[dict[str, float]]
    """Every validation: `step` and its metrics."""
    seconds: float
    """Wall-clock time in the loop, over all restarts."""
    samples_per_s: float
    """Training crops a second over all workers, validations, checkpoints and rolled-back steps not counted."""
    trips: list[dict[str, Any]] = field(default_factory=list)
    """Trips of the guard that training recovered from, each a `linearsr.guard.Trip`."""

    messages: list[str] = field(default_factory=list)
    """What else went wrong without stopping training, such as checkpoints that could not be written or read."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> "TrainOutcome":
        """Read what `to_json` returned.

        Raises:
            ValueError: if fields are missing or unknown.
        """
        names = set(cls.__dataclass_fields__)
        if not isinstance(value, dict) or {*value, "trips", "messages"} != names:
            raise ValueError(f"outcome: got {value!r:.200}; expected an object with {sorted(names)}")
        return cls(**value)
