"""The progress board: workers of all trainers write events, the driver reads them in order."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

EventKind = Literal["start", "metrics", "validation", "checkpoint", "trip", "message", "end", "doing"]
CAPACITY = 20_000
"""Events kept for a driver that does not read; then the oldest go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened in a trainer."""

    sequence: int
    """Number on the board, from 1 in order of arrival; a gap means that the driver came too late."""
    source: str
    """Name of the job: `pretrain`, `expert-1`."""
    kind: EventKind
    """`start`: workers begin at `step`, 0 or where they resume; `checkpoint`: from now on they resume at `step`;
    `trip`: the guard took them back to `step`, or stopped them; `message`: something went wrong and did not stop them;
    `doing`: what a trial of a search is at, in a few words."""
    step: int
    values: dict[str, float]
    """Metrics by name."""
    detail: dict[str, Any] = field(default_factory=dict)
    """Of a validation what the knee detector made of it; of a trip the `Trip`; of a message its `text`; of an end `stopped_by` or
    `error`."""


class _Board:
    """The actor's state."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=CAPACITY)
        self._sequence = 0

    def push(self, source: str, kind: EventKind, step: int, values: dict[str, float], detail: dict[str, Any]) -> None:
        self._sequence += 1
        event = Event(sequence=self._sequence, source=source, kind=kind, step=step, values=values, detail=detail)
        self._events.append(event)

    def after(self, sequence: int) -> list[Event]:
        """Return the events after a number and forget those up to it."""
        while self._events and self._events[0].sequence <= sequence:
            self._events.popleft()
        return list(self._events)


class ProgressBoard:
    """Handle of a board; picklable, so that it goes to workers inside a job. One driver reads."""

    def __init__(self, actor: Any) -> None:
        """Wrap a running actor; use `start`."""
        self._actor = actor
        self._seen = 0

    @classmethod
    def start(cls) -> Self:
        """Start an empty board on the driver's node, where it lives as long as the driver does."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return cls(ray.remote(_Board).options(num_cpus=0, scheduling_strategy=here).remote())

    def push(self, source: str, kind: EventKind, step: int, values: Mapping[str, float], detail: Mapping[str, Any] | None = None) -> None:
        """Write an event without waiting for the board; events of one process arrive in its order."""
        self._actor.push.remote(source, kind, step, dict(values), dict(detail or {}))

    def drain(self) -> list[Event]:
        """Return the events since the last call, oldest first."""
        events: list[Event] = ray.get(self._actor.after.remote(self._seen))
        if events:
            self._seen = events[-1].sequence
        return events

    def close(self) -> None:
        """Stop the board; what was not drained is gone."""
        ray.kill(self._actor)
