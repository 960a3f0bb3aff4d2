"""Synthetic validation curves whose knee is known, for judging knee detectors.

A curve is, for each of 3 to 5 metrics m, a shape seen through noise: Y_m(t) = A_m (rise_m(t) + after_m(t)) + s_m e_m(t), t the
evaluation counted from 0, with A_m ~ U[.8, 1.2] and s_m = A_m / SNR. The noise e_m has unit variance; it is AR(1) with coefficient rho
and shares a part with the other metrics, because all of them measure one network. After the onset the noise grows by a factor, or the
shape declines, or both. The knee K is the evaluation at which a metric has done 95 to 99 % of its rise, the onset the last evaluation
before anything gets worse. At the end every metric gets a random unit, offset and orientation, and the steps a random spacing.
Everything follows from the seed.
Source: method.md 4.7, extended by the families of its weak spots.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A drawn curve and the truth about it."""

    family: str
    points: list[tuple[int, dict[str, float]]]
    orientations: dict[str, bool]
    knee: int | None
    """Index of the evaluation at the knee; None where there is none."""
    onset: int | None
    """Index of the last evaluation before oscillation or decline; None where there is none."""
    fold: float
    """By how much the noise grows after the onset."""


@dataclass(frozen=True)
class Shape:
    """What a family draws: oriented curves without units."""

    clean: Array
    """(evaluations, metrics), a rise of height 1 a metric."""
    noise: Array
    """(evaluations, metrics), standard deviation in the same units."""
    knee: int | None
    onset: int | None
    fold: float = 1.0
    rho: float = 0.3
    shared: float = 0.2
    """Correlation of the noise between metrics."""
    tails: float = np.inf
    """Degrees of freedom of Student's t; infinity is normal noise."""
    missing: float = 0.0
    """Probability that a single value is missing."""


def _saturating(rng: np.random.Generator, n: int, m: int, knee: int, jitter: int = 2) -> Array:
    """Exponential rises that have done 95 to 99 % at the knee."""
    knees = np.maximum(3, knee + rng.integers(-jitter, jitter + 1, m))
    return 1 - np.exp(-np.arange(n)[:, None] / (knees / rng.uniform(3, 5, m)))


def _after(n: int, onset: int) -> Array:
    """Evaluations since the onset, 0 up to it."""
    return np.maximum(0, np.arange(n) - onset)[:, None].astype(float)


def _level(rng: np.random.Generator, n: int, m: int, snr: tuple[float, float]) -> Array:
    return np.full((n, m), 1 / rng.uniform(*snr))


def _oscillation(rng: np.random.Generator, m: int, *, fold: tuple[float, float] = (2, 5), snr: tuple[float, float] = (8, 16)) -> Shape:
    n, knee = int(rng.integers(90, 130)), int(rng.integers(18, 60))
    onset, factor = knee + int(rng.integers(2, 11)), rng.uniform(*fold)
    noise = _level(rng, n, m, snr)
    return Shape(_saturating(rng, n, m, knee), noise * np.where(_after(n, onset) > 0, factor, 1), knee, onset, factor)


def _swinging(rng: np.random.Generator, m: int) -> Shape:
    """The oscillation is a wave with a period of 3 to 8 evaluations and a phase of its own for each metric."""
    base = _oscillation(rng, m, fold=(1, 1))
    n, onset, factor = len(base.clean), base.onset or 0, rng.uniform(3, 5)
    phase = rng.uniform(0, 2 * np.pi, m) + 2 * np.pi * _after(n, onset) / rng.uniform(3, 8)
    # The wave's deviation makes up the total of the stated factor.
    wave = np.sin(phase) * base.noise * np.sqrt(2 * (factor**2 - 1)) * (_after(n, onset) > 0)
    return replace(base, clean=base.clean + wave, fold=factor)


def _growing(rng: np.random.Generator, m: int) -> Shape:
    """The oscillation grows over 12 to 20 evaluations to its full size."""
    base = _oscillation(rng, m, fold=(1, 1))
    n, onset, factor = len(base.clean), base.onset or 0, rng.uniform(3, 5)
    growth = 1 + (factor - 1) * np.minimum(1, _after(n, onset) / rng.integers(12, 21))
    return replace(base, noise=base.noise * growth, fold=factor)


def _decline(rng: np.random.Generator, m: int, *, rate: tuple[float, float] = (0.008, 0.03), fold: tuple[float, float] = (1, 2)) -> Shape:
    base = _oscillation(rng, m, fold=fold)
    n, onset = len(base.clean), base.onset or 0
    return replace(base, clean=base.clean - _after(n, onset) * rng.uniform(*rate) * rng.uniform(0.7, 1.3, m))


def _early_overfit(rng: np.random.Generator, m: int) -> Shape:
    n, knee = int(rng.integers(40, 80)), int(rng.integers(5, 13))
    onset, factor = knee + int(rng.integers(1, 4)), rng.uniform(1.5, 3)
    clean = _saturating(rng, n, m, knee, jitter=1) - _after(n, onset) * rng.uniform(0.02, 0.05) * rng.uniform(0.7, 1.3, m)
    return Shape(clean, _level(rng, n, m, (10, 20)) * np.where(_after(n, onset) > 0, factor, 1), knee, onset, factor)


def _noisy(rng: np.random.Generator, m: int) -> Shape:
    return _oscillation(rng, m, fold=(3, 5), snr=(4, 8))


def _heavy_tailed(rng: np.random.Generator, m: int) -> Shape:
    return replace(_oscillation(rng, m, fold=(3, 5), snr=(10, 20)), tails=3.0)


def _conflict(rng: np.random.Generator, m: int) -> Shape:
    """Distortion turns down gently at the knee while perception goes on rising, until all oscillate."""
    base = _oscillation(rng, m, fold=(3, 5))
    n, knee, onset = len(base.clean), base.knee or 0, base.onset or 0
    falling = np.arange(m) < m // 2
    since = np.minimum(_after(n, knee), onset - knee)
    return replace(base, clean=base.clean + since * np.where(falling, -0.01, 0.012))


def _staircase(rng: np.random.Generator, m: int) -> Shape:
    """Two to four stairs, each begun by a cut of the learning rate; the knee is on the last."""
    stairs = int(rng.integers(2, 5))
    lengths = rng.integers(12, 22, stairs)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    n = int(lengths.sum() + rng.integers(35, 60))
    heights = np.concatenate([[0.6], np.full(stairs - 1, 0.4 / (stairs - 1))])
    clean = np.zeros((n, m))
    for start, height in zip(starts, heights, strict=True):
        since = np.maximum(0, np.arange(n) - start)[:, None]
        clean += height * (1 - np.exp(-since / rng.uniform(1.0, 2.5, m)))
    knee = int(starts[-1] + 7)
    onset, factor = knee + int(rng.integers(2, 11)), rng.uniform(3, 5)
    return Shape(clean, _level(rng, n, m, (15, 30)) * np.where(_after(n, onset) > 0, factor, 1), knee, onset, factor)


def _sparse(rng: np.random.Generator, m: int) -> Shape:
    n, knee = int(rng.integers(18, 30)), int(rng.integers(6, 11))
    onset, factor = knee + int(rng.integers(1, 4)), rng.uniform(3, 5)
    noise = _level(rng, n, m, (10, 20)) * np.where(_after(n, onset) > 0, factor, 1)
    return Shape(_saturating(rng, n, m, knee, jitter=1), noise, knee, onset, factor, missing=0.1)


def _autocorrelated(rng: np.random.Generator, m: int) -> Shape:
    return replace(_oscillation(rng, m, fold=(3, 5)), rho=0.6)


def _rise_only(rng: np.random.Generator, m: int) -> Shape:
    """Logarithms and exponentials that have not saturated at the end."""
    n = int(rng.integers(90, 130))
    t = np.arange(n)[:, None]
    slow = rng.uniform(2, 10, m)
    logarithm = np.log1p(t / slow) / np.log1p(n / slow)
    tau = n / rng.uniform(1.2, 2.5, m)
    exponential = (1 - np.exp(-t / tau)) / (1 - np.exp(-n / tau))
    return Shape(logarithm if rng.random() < 0.5 else exponential, _level(rng, n, m, (8, 16)), None, None, rho=0.0)


def _slow_rise(rng: np.random.Generator, m: int) -> Shape:
    """A quick start, then a straight line of 0.1 to 0.5 noise units an evaluation."""
    n = int(rng.integers(90, 130))
    noise = _level(rng, n, m, (8, 16))
    clean = 0.5 * _saturating(rng, n, m, int(rng.integers(6, 20))) + np.arange(n)[:, None] * noise * rng.uniform(0.1, 0.5)
    return Shape(clean, noise, None, None, rho=0.0)


def _plateau_only(rng: np.random.Generator, m: int) -> Shape:
    """A rise and a plateau that lasts; nothing ever gets worse."""
    n, knee = int(rng.integers(90, 130)), int(rng.integers(18, 60))
    return Shape(_saturating(rng, n, m, knee), _level(rng, n, m, (8, 16)), None, None, rho=0.0)


def _correlated(draw: Callable[[np.random.Generator, int], Shape]) -> Callable[[np.random.Generator, int], Shape]:
    return lambda rng, m: replace(draw(rng, m), rho=0.6)


WITH_KNEE: dict[str, Callable[[np.random.Generator, int], Shape]] = {
    "oscillation": _oscillation,
    "swinging": _swinging,
    "growing": _growing,
    "decline": _decline,
    "early overfit": _early_overfit,
    "noisy": _noisy,
    "heavy tails": _heavy_tailed,
    "conflict": _conflict,
    "staircase": _staircase,
    "sparse": _sparse,
    "AR .6": _autocorrelated,
}
"""Families that have a knee."""
HARDER = ("growing", "swinging", "AR .6")
"""Families with a knee that are known to be hard: oscillation that grows slowly, that is a wave, and strongly autocorrelated noise."""
WITHOUT_KNEE: dict[str, Callable[[np.random.Generator, int], Shape]] = {
    "rise only": _rise_only,
    "slow rise": _slow_rise,
    "plateau": _plateau_only,
    "rise only, AR .6": _correlated(_rise_only),
    "slow rise, AR .6": _correlated(_slow_rise),
    "plateau, AR .6": _correlated(_plateau_only),
}
"""Families that have none; the noise is independent where it is not said otherwise."""


def draw(family: str, seed: int, num_metrics: int | None = None) -> Curve:
    """Draw one curve of a family; 3 to 5 metrics unless their number is given."""
    rng = np.random.default_rng([seed, *family.encode()])
    count = int(rng.integers(3, 6)) if num_metrics is None else num_metrics
    return realise(family, {**WITH_KNEE, **WITHOUT_KNEE}[family](rng, count), rng)


def realise(family: str, shape: Shape, rng: np.random.Generator) -> Curve:
    """Add noise, units, orientations and steps to a shape."""
    n, m = shape.clean.shape
    heights = rng.uniform(0.8, 1.2, m)
    values = heights * (shape.clean + shape.noise * _unit_noise(rng, n, m, shape))
    higher = rng.random(m) < 0.5
    columns = rng.uniform(-50, 50, m) + np.exp(rng.uniform(-4, 4, m)) * np.where(higher, 1, -1) * values
    gaps = rng.integers(90, 111, n) if rng.random() < 0.3 else np.full(n, 100)
    steps = np.cumsum(gaps)
    names = [f"m{column}" for column in range(m)]
    gone = rng.random((n, m)) < shape.missing
    points = [(int(steps[i]), {names[j]: float(columns[i, j]) for j in range(m) if not gone[i, j]}) for i in range(n)]
    orientations = {name: bool(up) for name, up in zip(names, higher, strict=True)}
    return Curve(family, points, orientations, shape.knee, shape.onset, shape.fold)


def _unit_noise(rng: np.random.Generator, n: int, m: int, shape: Shape) -> Array:
    """Draw noise of unit variance: AR(1) in time, correlated between metrics, with the tails asked for."""

    def innovations(columns: int) -> Array:
        if np.isinf(shape.tails):
            return rng.standard_normal((n + 50, columns))
        return rng.standard_t(shape.tails, (n + 50, columns)) / np.sqrt(shape.tails / (shape.tails - 2))

    drawn = np.sqrt(1 - shape.shared) * innovations(m) + np.sqrt(shape.shared) * innovations(1)
    series = np.zeros_like(drawn)
    for i in range(1, len(drawn)):
        series[i] = shape.rho * series[i - 1] + np.sqrt(1 - shape.rho**2) * drawn[i]
    return series[50:]
