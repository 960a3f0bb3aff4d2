"""Where to cut the noise axis into experts: the grid a search moves on, and proposals, some from a trained network's gradients.

Boundaries are ascending noise levels in (0, 1); their log-SNR, in which distances mean something, descend. Imports no torch.
Source: method.md part 5.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray

from linearsr.experts import EFFECTIVE_LOG_SNR, bisect_boundaries, log_snr, noise_level
from linearsr.noise_profile import NoiseProfile

Array = NDArray[np.float64]

ANCHOR = 0.875
"""The paper's boundary between structure and refinement, from Wan2.2. Source: method.md 3.1, 3.4."""
LEAST_CONFLICT = "least-conflict"
"""Name of the proposal whose note also says how sure it is."""
_SIGNAL = 2.0  # Standard errors from which a level's gradient stands out of its noise.
_CLEAR = 0.5  # Share of training that must have such gradients before the conflict is quoted without a warning.
_KNOWN_LEVELS = 2  # Levels that a cut may move over in redraws; in the planted benchmark cuts that missed moved further.
_ROUNDING = 1e-9  # Grid steps below which a remainder is float noise, not a part of a step.
_SAME = 1e-6  # Log-SNR below which two cuts are one.


@dataclass(frozen=True, kw_only=True)
class CutGrid:
    """Where boundaries may lie: on multiples of `step` above `low`, each expert at least `min_width` wide, all in log-SNR.

    Any offsets are valid: order and widths hold by construction, so a search needs no constraints.

    Raises:
        ValueError: if the range is empty, or `step` or `min_width` is not positive.
    """

    low: float = EFFECTIVE_LOG_SNR[0]
    high: float = EFFECTIVE_LOG_SNR[1]
    step: float = 0.25
    min_width: float = 0.5

    def __post_init__(self) -> None:
        """Check ranges."""
        if not (self.low < self.high and self.step > 0 and self.min_width > 0):
            raise ValueError(f"grid: got {self}; expected low < high, and a positive step and min_width; fix: those settings")

    def slack(self, experts: int) -> int:
        """Return the grid steps left over when all `experts` have their minimum width.

        Raises:
            ValueError: if they do not fit, with the arithmetic.
        """
        if experts < 1:
            raise ValueError(f"grid: got {experts} experts; expected at least 1; fix: `experts`")
        total = floor((self.high - self.low) / self.step + _ROUNDING)
        left = total - experts * self._min_steps()
        if left < 0:
            raise ValueError(
                f"grid: got {experts} experts x {self._min_steps()} steps of {self.step} (min_width {self.min_width}) = "
                f"{experts * self._min_steps()}; expected at most the {total} steps of [{self.low}, {self.high}]; "
                "fix: fewer experts or a smaller min_width"
            )
        return left

    def boundaries(self, offsets: Sequence[int]) -> tuple[float, ...]:
        """Return the boundaries of K - 1 offsets in [0, slack], in any order: each says how many spare steps lie on its noisy side.

        Raises:
            ValueError: if an offset is outside that range.
        """
        slack = self.slack(len(offsets) + 1)
        if not all(0 <= offset <= slack for offset in offsets):
            raise ValueError(f"grid: got offsets {tuple(offsets)}; expected whole numbers in [0, {slack}]; fix: draw them from that range")
        cuts = (self.low + (offset + i * self._min_steps()) * self.step for i, offset in enumerate(sorted(offsets), start=1))
        return _boundaries(cuts)

    def offsets(self, boundaries: Sequence[float]) -> tuple[int, ...]:
        """Return the ascending offsets of the valid cuts nearest to `boundaries`; on the grid the inverse of `boundaries`.

        Nearest in the sum of squared log-SNR distances, which isotonic regression minimises, up to rounding to the grid.
        """
        slack = self.slack(len(boundaries) + 1)
        cuts = sorted(log_snr(boundary) for boundary in boundaries)
        spare = [(cut - self.low) / self.step - i * self._min_steps() for i, cut in enumerate(cuts, start=1)]
        means = [[np.mean(spare[start : end + 1]) if start <= end else 0.0 for end in range(len(spare))] for start in range(len(spare))]
        ordered = [max(min(means[start][i:]) for start in range(i + 1)) for i in range(len(spare))]
        return tuple(min(max(round(float(one)), 0), slack) for one in ordered)

    def _min_steps(self) -> int:
        return ceil(self.min_width / self.step - _ROUNDING)


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Boundaries worth training first."""

    name: str
    boundaries: tuple[float, ...]
    """Ascending noise levels."""
    note: str = ""
    """What is known about them before anything is trained, in words."""


def bisection(experts: int) -> tuple[float, ...]:
    """Return the paper's boundaries for any number of experts: its anchor, both sides of it halved, then the widest halved again.

    With 4 experts exactly the paper's three, with 2 the anchor alone; of equally wide intervals the noisier is halved first.
    Source: LinearSR section 3; method.md 3.1.
    """
    if experts < 2:
        return ()
    known = bisect_boundaries(ANCHOR) if experts >= 4 else (ANCHOR,)
    cuts = [EFFECTIVE_LOG_SNR[0], *sorted(log_snr(boundary) for boundary in known), EFFECTIVE_LOG_SNR[1]]
    while len(cuts) < experts + 1:
        widest = max(range(len(cuts) - 1), key=lambda i: (round((cuts[i + 1] - cuts[i]) / _SAME), -i))
        cuts.insert(widest + 1, (cuts[widest] + cuts[widest + 1]) / 2)
    return _boundaries(cuts[1:-1])


def uniform_time(experts: int) -> tuple[float, ...]:
    """Return boundaries at equal distances of noise level, (0.25, 0.5, 0.75) for 4 experts; the paper's ablation."""
    return tuple(i / experts for i in range(1, experts))


def uniform_log_snr(experts: int, grid: CutGrid) -> tuple[float, ...]:
    """Return boundaries at equal distances of log-SNR over the grid's range. Source: method.md 5.4."""
    return _boundaries(grid.low + (grid.high - grid.low) * i / experts for i in range(1, experts))


def equal_loss(profile: NoiseProfile, experts: int) -> tuple[float, ...]:
    """Return boundaries that give each expert the same share of the training loss, taken as constant within a level.

    Source: method.md 5.3 P4, there called weak, because the part of the loss that nobody can learn differs by level.
    """
    work = np.asarray(profile.mass) * np.asarray(profile.loss)
    shares = np.concatenate([[0.0], np.cumsum(work) / work.sum()])
    return _boundaries(float(np.interp(i / experts, shares, profile.edges)) for i in range(1, experts))


def least_conflict(profile: NoiseProfile, experts: int, min_width: float) -> tuple[float, ...]:
    """Return the boundaries, on edges of levels, that leave the least gradient conflict inside the experts.

    Args:
        profile: Affinities and masses.
        experts: Number of intervals.
        min_width: Least width of an expert, log-SNR.

    Raises:
        ValueError: if there are too few levels for that many experts so wide.
    Source: method.md 5.3 P2 with `disagreement`; Go et al., NeurIPS 2023.
    """
    costs = _interval_costs(np.asarray(profile.mass), disagreement(profile))
    cuts = least_cost_intervals(costs, experts, _min_levels(profile, min_width))
    return _boundaries(profile.edges[cut] for cut in cuts)


def least_conflict_ranges(
    profile: NoiseProfile, experts: int, min_width: float, *, draws: int = 60, seed: int = 0
) -> tuple[tuple[float, float], ...]:
    """Return between which log-SNRs each of the least-conflict cuts falls in 90 % of redraws of the profile within its errors.

    The errors of different pairs are drawn independently. They are so where noise dominates, which is where this matters; and the redraws
    start from what is noisy already, so the ranges are rather too wide than too narrow.

    Returns:
        (low, high) of each cut, ascending; none for one expert.

    Raises:
        ValueError: as `least_conflict`.
    """
    rng = np.random.default_rng(seed)
    mass, min_levels = np.asarray(profile.mass), _min_levels(profile, min_width)
    affinity, norm = np.asarray(profile.affinity), np.asarray(profile.gradient_norm)
    found = []
    for _ in range(draws):
        noise = np.triu(rng.standard_normal(affinity.shape), 1)
        redrawn = np.clip(affinity + (noise + noise.T) * profile.affinity_error, -1, 1)
        norms = np.maximum(norm + rng.standard_normal(len(norm)) * profile.gradient_norm_error, 0)
        cuts = least_cost_intervals(_interval_costs(mass, _distances(redrawn, _lengths(profile, norms))), experts, min_levels)
        found.append([profile.edges[cut] for cut in cuts])
    low, high = np.quantile(np.array(found).reshape(draws, -1), (0.05, 0.95), axis=0, method="inverted_cdf")
    return tuple(zip(low.tolist(), high.tolist(), strict=True))


def least_cost_intervals(costs: Array, count: int, min_levels: int = 1) -> tuple[int, ...]:
    """Split J levels into `count` intervals of least total cost, exactly, by dynamic programming in O(count J^2).

    Args:
        costs: (J, J); [start, end] is the cost of the levels start to end, both included. Below the diagonal nothing is read.
        count: Number of intervals.
        min_levels: Least number of levels in each.
    Returns:
        The first levels of all intervals but the first, ascending; of equally good splits the one with the earliest cuts.

    Raises:
        ValueError: if `count` intervals of `min_levels` levels do not fit.
    """
    levels = len(costs)
    if count < 1 or min_levels < 1 or count * min_levels > levels:
        got = f"{count} intervals x {min_levels} levels"
        raise ValueError(
            f"partition: got {got}; expected at least 1 of each and at most {levels} together; fix: fewer experts or finer levels"
        )
    starts, ends = np.indices(costs.shape)
    allowed = np.where(ends - starts + 1 >= min_levels, costs, np.inf)
    rest = allowed[:, -1]  # Least cost of the levels from each start on, in as many intervals as planned so far.
    choices = []
    for _ in range(count - 1):
        # Interval [start, end], and the rest from end + 1 on.
        totals = allowed[:, :-1] + rest[None, 1:]
        choices.append(totals.argmin(axis=1) + 1)
        rest = totals.min(axis=1)
    cuts: list[int] = []
    for choice in reversed(choices):
        cuts.append(int(choice[cuts[-1] if cuts else 0]))
    return tuple(cuts)


def conflict(profile: NoiseProfile, boundaries: Sequence[float]) -> float:
    """Return the share of gradient conflict left inside the experts' intervals; 1 is a single expert over all levels.

    A level that a boundary divides counts on both sides, by width. Where a single expert has no conflict, it is 1 for all boundaries.
    """
    costs = disagreement(profile)
    mass = np.asarray(profile.mass)
    whole = float(mass @ costs @ mass)
    if whole <= 0:
        return 1.0
    cuts = np.clip(sorted(log_snr(boundary) for boundary in boundaries), profile.edges[0], profile.edges[-1])
    # Share of every level below each cut.
    below = np.array([np.interp(cut, profile.edges, np.arange(len(mass) + 1.0)) for cut in cuts]).reshape(-1, 1) - np.arange(len(mass))
    shares = np.diff(np.clip(np.vstack([np.zeros(len(mass)), below, np.ones(len(mass))]), 0, 1), axis=0) * mass
    return sum(float(share @ costs @ share / share.sum()) for share in shares if share.sum() > 0) / whole


def disagreement(profile: NoiseProfile) -> Array:
    """Return how much each pair of levels disagrees about the weights, (J, J), at least 0, and 0 on the diagonal.

    It is half the squared distance between the two gradients of log loss, |g_j / L_j - g_k / L_k|^2 / 2, which is 1 - affinity where both
    have length 1. Angles alone, as in method.md 5.3, would count levels that the network serves almost perfectly, and whose small gradients
    differ in sign as they must at an optimum, as much as levels it serves badly. Dividing by the loss makes levels comparable whose losses
    differ by orders of magnitude. Where noise hides how long the gradients are, all get the same length and only the angles decide.
    """
    return _distances(np.asarray(profile.affinity), _lengths(profile, np.asarray(profile.gradient_norm)))


def propose(experts: int, *, profile: NoiseProfile | None, grid: CutGrid) -> list[Proposal]:
    """Return all proposals for that many experts, without those that need a profile if there is none.

    Of proposals with the same boundaries only the first is kept.

    Raises:
        ValueError: if the experts do not fit on the grid or on the profile's levels.
    """
    grid.slack(experts)
    found: dict[tuple[int, ...], Proposal] = {}
    for name, make in PROPOSALS.items():
        boundaries = make(experts, profile, grid)
        if boundaries is None:
            continue
        note = "" if profile is None else _note(name, profile, boundaries, grid)
        key = tuple(round(log_snr(boundary) / _SAME) for boundary in boundaries)
        first = found.get(key)
        if first is None:
            found[key] = Proposal(name=name, boundaries=boundaries, note=note)
        elif name == LEAST_CONFLICT:
            # How sure the profile is of these boundaries must not get lost with the name.
            found[key] = replace(first, note=f"also {name}: {note}")
    return list(found.values())


def _note(name: str, profile: NoiseProfile, boundaries: tuple[float, ...], grid: CutGrid) -> str:
    """Say how much conflict is left, and how far the profile can be trusted in that."""
    left = f"leaves {conflict(profile, boundaries):.0%} of the gradient conflict"
    clear = sum(mass for mass, signal in zip(profile.mass, profile.signal_to_noise(), strict=True) if signal >= _SIGNAL)
    if clear < _CLEAR:
        left += f" (roughly: in only {clear:.0%} of training gradients stand out of their noise)"
    if name != LEAST_CONFLICT or not boundaries:
        return left
    ranges = least_conflict_ranges(profile, len(boundaries) + 1, grid.min_width)
    where = ", ".join(f"{noise_level(high):.3f} to {noise_level(low):.3f}" for low, high in reversed(ranges))
    width = max(high - low for low, high in pairwise(profile.edges))
    known = all(high - low < (_KNOWN_LEVELS + _ROUNDING) * width for low, high in ranges)
    return f"{left}; noise moves it over {where}" + ("" if known else ": too noisy to trust, profile with more samples")


Proposer = Callable[[int, NoiseProfile | None, CutGrid], tuple[float, ...] | None]
"""From experts, profile and grid to boundaries, or to None without the profile it needs."""

PROPOSALS: dict[str, Proposer] = {
    "bisection": lambda experts, profile, grid: bisection(experts),
    "uniform-time": lambda experts, profile, grid: uniform_time(experts),
    "uniform-log-snr": lambda experts, profile, grid: uniform_log_snr(experts, grid),
    "equal-loss": lambda experts, profile, grid: None if profile is None else equal_loss(profile, experts),
    LEAST_CONFLICT: lambda experts, profile, grid: None if profile is None else least_conflict(profile, experts, grid.min_width),
}
"""Name -> how it is made, in the order in which they are worth trying without further knowledge."""


def _boundaries(cuts: Iterable[float]) -> tuple[float, ...]:
    """Turn log-SNR cuts into ascending noise levels."""
    return tuple(sorted(noise_level(cut) for cut in cuts))


def _min_levels(profile: NoiseProfile, min_width: float) -> int:
    """Return how many levels are at least `min_width` wide, whichever they are."""
    return max(1, ceil(min_width / min(high - low for low, high in pairwise(profile.edges)) - _ROUNDING))


def _lengths(profile: NoiseProfile, norms: Array) -> Array:
    """Return the lengths of the gradients of log loss, each drawn to the mean of all as far as errors explain how they differ.

    Source: empirical Bayes shrinkage, Efron and Morris 1973. On planted splits whose gradients are mostly noise (signal to noise 0.6, three
    experts) it finds 34 of 40; plain lengths find 19, angles alone 36. Where they are clear, angles alone find 30 of 40, both lengths all.
    """
    lengths, errors = norms / profile.loss, np.asarray(profile.gradient_norm_error) / profile.loss
    mass = np.asarray(profile.mass)
    mean = mass @ lengths / mass.sum()
    variance = max(float(mass @ ((lengths - mean) ** 2 - errors**2)), 0.0)
    kept = np.divide(variance, variance + errors**2, out=np.ones_like(errors), where=errors > 0)
    steadied: Array = mean + kept * (lengths - mean)
    return steadied


def _distances(affinity: Array, length: Array) -> Array:
    """Return half the squared distances between vectors of these cosines and lengths."""
    distances: Array = np.add.outer(length**2, length**2) / 2 - affinity * np.outer(length, length)
    np.fill_diagonal(distances, 0.0)
    return distances


def _interval_costs(mass: Array, distances: Array) -> Array:
    """Return the (J, J) conflict of the levels start to end, 0 below the diagonal. Source: method.md 5.3 P2."""
    pairs = np.outer(mass, mass) * distances
    costs = np.zeros_like(pairs)
    # Sums from each start, not differences of sums over all: at the ends masses may be far under the rounding error of those.
    for start in range(len(mass)):
        inside = pairs[start:, start:].cumsum(axis=0).cumsum(axis=1).diagonal()
        share = mass[start:].cumsum()
        costs[start, start:] = np.divide(inside, share, out=np.zeros_like(inside), where=share > 0)
    return costs
