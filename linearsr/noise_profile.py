"""What a trained network's gradients say about the noise axis, level by level. Imports no torch.

Whether one expert or two should serve two noise levels shows in the affinity of their gradients: near 1 a step for one helps the other,
below 0 it harms it. Measuring is `linearsr.profiling`'s, cutting the axis by it `linearsr.partition`'s.
Source: method.md 5.3 P2; interval clustering of Go et al., NeurIPS 2023.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from math import isfinite
from typing import Any

import numpy as np

MASS_TOLERANCE = 1e-6
"""How far the masses of all levels together may be from 1."""


@dataclass(frozen=True, kw_only=True)
class NoiseProfile:
    """Loss, mean gradient and gradient affinity at J levels of log-SNR, noisiest first, each with its standard error.

    Raises:
        ValueError: if lengths do not agree, or a value is not finite or out of its range.
    """

    edges: tuple[float, ...]
    """J + 1 ascending log-SNR; the first and the last level also take what lies beyond."""
    mass: tuple[float, ...]
    """Share of training draws in each level; sums to 1."""
    loss: tuple[float, ...]
    """Mean training loss, positive."""
    loss_error: tuple[float, ...]
    gradient_norm: tuple[float, ...]
    """Norm of the mean gradient, without the part that noise adds; 0 where noise explains all of it."""
    gradient_norm_error: tuple[float, ...]
    affinity: tuple[tuple[float, ...], ...]
    """J x J cosines between mean gradients in [-1, 1], without the pull towards 0 that noise adds; the diagonal is 1."""
    affinity_error: tuple[tuple[float, ...], ...]
    """Of the cosines before they were limited to [-1, 1]; 1, nothing is known, where a mean gradient is lost in its noise."""
    samples: int
    """Gradients a level, at least 2."""
    source: dict[str, str] = field(default_factory=dict)
    """Where it is from, free: weights, crops, ..."""

    def __post_init__(self) -> None:
        """Check everything."""
        count = len(self.mass)
        _check(
            count >= 1 and len(self.edges) == count + 1, "edges", len(self.edges), f"{count + 1}, one more than `mass`, and that at least 1"
        )
        for name in ("loss", "loss_error", "gradient_norm", "gradient_norm_error", "affinity", "affinity_error"):
            length = len(getattr(self, name))
            _check(length == count, name, f"{length} levels", f"{count} as in `mass`")
        for name in ("affinity", "affinity_error"):
            _check(all(len(row) == count for row in getattr(self, name)), name, "rows of another length", f"{count} x {count}")
        for name in ("edges", "mass", "loss", "loss_error", "gradient_norm", "gradient_norm_error", "affinity", "affinity_error"):
            _check(bool(np.isfinite(getattr(self, name)).all()), name, "NaN or infinity", "finite numbers")
        for name in ("mass", "loss_error", "gradient_norm", "gradient_norm_error", "affinity_error"):
            _check(float(np.min(getattr(self, name))) >= 0, name, float(np.min(getattr(self, name))), "at least 0")
        _check(min(self.loss) > 0, "loss", min(self.loss), "positive losses")
        _check(all(low < high for low, high in pairwise(self.edges)), "edges", self.edges, "ascending log-SNR")
        _check(abs(sum(self.mass) - 1) <= MASS_TOLERANCE, "mass", sum(self.mass), "a sum of 1")
        affinity = np.asarray(self.affinity)
        _check(float(np.abs(affinity).max()) <= 1, "affinity", float(np.abs(affinity).max()), "cosines in [-1, 1]")
        _check(bool((np.diag(affinity) == 1).all()), "affinity", np.diag(affinity).tolist(), "a diagonal of 1")
        _check(bool((affinity == affinity.T).all()), "affinity", "an asymmetric matrix", "a symmetric one")
        _check(self.samples >= 2, "samples", self.samples, "at least 2")

    def levels(self) -> tuple[float, ...]:
        """Return the J centres, log-SNR."""
        return tuple((low + high) / 2 for low, high in pairwise(self.edges))

    def signal_to_noise(self) -> tuple[float, ...]:
        """Return by how many standard errors each level's squared mean gradient exceeds 0; under 2 its affinities say little."""
        pairs = zip(self.gradient_norm, self.gradient_norm_error, strict=True)
        return tuple(norm / (2 * error) if error else float("inf") * norm if norm else 0.0 for norm, error in pairs)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values; `from_json` gives back an equal profile."""
        value = asdict(self)
        nested = {name: [list(row) for row in value[name]] for name in ("affinity", "affinity_error")}
        return {name: list(one) if isinstance(one, tuple) else one for name, one in value.items()} | nested

    @classmethod
    def from_json(cls, value: object) -> "NoiseProfile":
        """Read what `to_json` returned.

        Raises:
            ValueError: naming the key that is missing, unknown or holds something else.
        """
        known = {one.name for one in fields(cls)}
        if not isinstance(value, Mapping) or set(value) != known:
            keys = set(value) if isinstance(value, Mapping) else set()
            what = f"{type(value).__name__} without {sorted(known - keys)} and with {sorted(map(str, keys - known))} too many"
            raise ValueError(f"profile: got {what}; expected exactly the keys of a profile; fix: pass a file that a profiling run wrote")
        return cls(
            edges=_numbers(value, "edges"),
            mass=_numbers(value, "mass"),
            loss=_numbers(value, "loss"),
            loss_error=_numbers(value, "loss_error"),
            gradient_norm=_numbers(value, "gradient_norm"),
            gradient_norm_error=_numbers(value, "gradient_norm_error"),
            affinity=_matrix(value, "affinity"),
            affinity_error=_matrix(value, "affinity_error"),
            samples=_integer(value, "samples"),
            source=_texts(value, "source"),
        )


def _check(holds: bool, name: str, got: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"profile.{name}: got {got}; expected {expected}; fix: profile the network again")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _list(value: object, name: str) -> list[Any]:
    _check(isinstance(value, list), name, repr(value), "a list")
    return list(value) if isinstance(value, list) else []


def _row(value: object, name: str) -> tuple[float, ...]:
    row = _list(value, name)
    wrong = [one for one in row if not _is_number(one)]
    _check(not wrong, name, wrong[:1], "finite numbers")
    return tuple(float(one) for one in row)


def _numbers(value: Mapping[str, object], name: str) -> tuple[float, ...]:
    return _row(value[name], name)


def _matrix(value: Mapping[str, object], name: str) -> tuple[tuple[float, ...], ...]:
    return tuple(_row(row, name) for row in _list(value[name], name))


def _integer(value: Mapping[str, object], name: str) -> int:
    number = value[name]
    _check(isinstance(number, int) and not isinstance(number, bool), name, repr(number), "a whole number")
    return int(str(number))


def _texts(value: Mapping[str, object], name: str) -> dict[str, str]:
    texts = value[name]
    holds = isinstance(texts, dict) and all(isinstance(one, str) for pair in texts.items() for one in pair)
    _check(holds, name, repr(texts), "texts by name")
    return dict(texts) if isinstance(texts, dict) else {}
