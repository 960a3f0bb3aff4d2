"""Identity: of JSON values, and of the recipe that a run's folder was started with."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

RunKind = Literal["run", "search"]

PLACES: tuple[str, ...] = (
    "name",
    "storage",
    "cluster",
    "tracking",
    "*.workers",
    "*.cpus_per_worker",
    "*.zero.stage",
    "*.max_failures",
    "*.keep_checkpoints",
    "*.loader_workers",
    "*.min_workers",
    "*.accumulation",
    "data.parallel_from",
    "data.cache_*",
)
"""Settings, by dotted key with `*`, that say where, how fast and how safely a recipe runs, not what comes out: whatever they
are, it is the same recipe, and no finished stage is done again. A name is that of the folder.

`log_every` and `checkpoint_every` are none of them: they say when the guard looks, and to where it goes back."""
NOT_READ: dict[RunKind, tuple[str, ...]] = {
    "run": ("search",),
    # A search that is asked for more trials goes on where it was.
    "search": ("finetune", "evaluate", "promote", "search.trials", "search.max_concurrent"),
}
"""Settings that a kind of run does not read, or may change at any time."""


def stable_hash(value: object) -> str:
    """Return the SHA-256 (64 hex digits) of a JSON-able value; it does not depend on the order of keys.

    Raises:
        TypeError: if the value holds something JSON has no word for.
        ValueError: if it holds NaN or infinity.
    """
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


@dataclass(frozen=True)
class Change:
    """A setting that two recipes do not share; one that a recipe lacks is None there."""

    key: str
    was: object
    now: object

    def __str__(self) -> str:
        """Write it as one line."""
        return f"{self.key}: {_shown(self.was)} -> {_shown(self.now)}"


def deciding(resolved: Mapping[str, object], kind: RunKind) -> dict[str, object]:
    """Return the settings that decide what comes out, by dotted key; lists and empty mappings are values.

    Args:
        resolved: every setting of a recipe, as JSON.
        kind: what it is run for.
    """
    ignored = (*PLACES, *NOT_READ[kind])
    return {key: value for key, value in _flat(resolved, "").items() if not any(_covers(pattern, key) for pattern in ignored)}


def recipe_identity(resolved: Mapping[str, object], kind: RunKind) -> str:
    """Return the hash of the settings that decide what comes out."""
    return stable_hash(deciding(resolved, kind))


def changes(was: Mapping[str, object], now: Mapping[str, object], kind: RunKind) -> list[Change]:
    """Return what decides and differs between two resolved recipes, in the order of the new one, then what only the old one has."""
    before, after = deciding(was, kind), deciding(now, kind)
    keys = [*after, *(key for key in before if key not in after)]
    return [Change(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def _flat(settings: Mapping[str, object], prefix: str) -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _covers(pattern: str, key: str) -> bool:
    """Tell whether a pattern names a key or a section around it."""
    parts = key.split(".")
    return any(fnmatchcase(".".join(parts[:length]), pattern) for length in range(1, len(parts) + 1))


def _shown(value: object) -> str:
    """Write a value as a recipe does, not too long."""
    if value is None:
        return "not set"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def describe_changes(found: Sequence[Change], most: int = 20) -> str:
    """Write changes one a line, at most so many, then how many more there are."""
    lines = [f"  {change}" for change in found[:most]]
    return "\n".join([*lines, *([f"  and {len(found) - most} more"] if len(found) > most else [])])
