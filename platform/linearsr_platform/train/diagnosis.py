"""Which part of a network a fault was first seen in, from what the workers saw when the step was taken again. No collectives here."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from linearsr_platform.train.results import Sighting

STANDS_OUT = 5.0
"""Ratio to a sound step from which a part stands out. Gradients of neighbouring steps differ by less than 3 as a rule."""
TINY = 1e-12
"""Below it a sound value tells nothing, like the gradient of a layer behind one that starts at zero."""

Sightings = Sequence[Sequence[Sighting]]
"""Of every worker, in order of computation."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A part of the network and what was seen there."""

    layer: str | None
    evidence: str


def first_not_finite(sightings: Sightings) -> Finding | None:
    """Return the part whose value was the first not to be finite: forward before backward, then order of computation, then worker."""
    bad = [
        (one.kind == "gradient", index, worker, one)
        for worker, own in enumerate(sightings)
        for index, one in enumerate(own)
        if not isfinite(one.value)
    ]
    if not bad:
        return None
    _, _, worker, one = min(bad, key=lambda entry: entry[:3])
    return Finding(one.layer, f"{one.kind} of {one.layer} on worker {worker}: {one.value:g}")


def first_standing_out(sightings: Sightings, sound: Sightings | None) -> Finding | None:
    """Return the first part that is far larger than in a sound step; without one the parameter with the largest gradient.

    Args:
        sightings: of the bad step.
        sound: of a sound one with the same weights, if there is one.
    """
    if sound is not None:
        larger = [
            (one.kind == "gradient", index, worker, one, one.value / before)
            for worker, (own, theirs) in enumerate(zip(sightings, sound, strict=True))
            for index, one, before in _paired(own, theirs)
            if before > TINY and one.value >= STANDS_OUT * before
        ]
        if not larger:
            return None
        _, _, worker, one, ratio = min(larger, key=lambda entry: entry[:3])
        return Finding(one.layer, f"{one.kind} of {one.layer} on worker {worker}: {one.value:.4g}, {ratio:.3g} times a sound step's")
    gradients = [(one.value, -worker, one) for worker, own in enumerate(sightings) for one in own if one.kind == "gradient"]
    if not gradients:
        return None
    value, worker, one = max(gradients, key=lambda entry: entry[:2])
    return Finding(one.layer, f"largest gradient: {one.layer} on worker {-worker}, {value:.4g}")


def bad_weights(norms: Mapping[str, float]) -> Finding | None:
    """Return the first parameter that is not finite, from norms in network order; None if none is, or all are."""
    bad = [name for name, norm in norms.items() if not isfinite(norm)]
    if not bad or len(bad) == len(norms):
        # All: one bad gradient does that by its share in the clipping norm, and tells nothing of where it came from.
        return None
    more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
    return Finding(bad[0], f"weights of {bad[0]}: not finite{more}")


def grown_weights(norms: Mapping[str, float], sound: Mapping[str, float]) -> str:
    """Name the parameter that has grown most since the step gone back to; empty if none has doubled."""
    growth = {name: norms[name] / norm for name, norm in sound.items() if norm > TINY and isfinite(norms.get(name, float("nan")))}
    name = max(growth, key=lambda one: growth[one], default="")
    return f"weights of {name} had grown {growth[name]:.3g}-fold" if name and growth[name] >= 2 else ""


def _paired(own: Sequence[Sighting], sound: Sequence[Sighting]) -> Iterator[tuple[int, Sighting, float]]:
    """Yield position and sighting with its value in the sound step; a part seen twice is paired in order."""
    values = {key: one.value for key, one in _keyed(sound)}
    for index, (key, one) in enumerate(_keyed(own)):
        if key in values:
            yield index, one, values[key]


def _keyed(sightings: Sequence[Sighting]) -> Iterator[tuple[tuple[str, str, int], Sighting]]:
    seen: Counter[tuple[str, str]] = Counter()
    for one in sightings:
        seen[one.kind, one.layer] += 1
        yield (one.kind, one.layer, seen[one.kind, one.layer]), one
