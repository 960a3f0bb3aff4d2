"""How many trials a boundary search needs, and how many trainings a cache saves, on surfaces whose optimum is known. Prints Markdown.

Run: python tests/benchmarks/search/proposals_vs_random.py [--seeds 20] [--first-seed 0] [--experts 4 2] [--noise 0.02] [--angle-noise 0.1]
     [--profile-levels 63]

A surface is a curve over log-SNR that drifts smoothly and jumps at planted places: what the best single network would have to know at
that noise level. One expert for levels that differ must compromise, so a split scores minus the variance of the curve inside its
intervals, weighted by how often a level is trained. The optimum is exact, by dynamic programming over all cuts on the grid. An
evaluation adds noise of `--noise` times the distance from one expert to the optimum. The profile that the proposals read knows the
curve only as angles between gradients, on `--profile-levels`, each cosine with an error of `--angle-noise`, and a loss that says nothing.

Columns: `trials`, until the noise-free score of one of them has closed 95 % of the distance from one expert to the optimum, median
and quartiles; `in 24` and `in 200`, the share of surfaces where that took at most so many; `saved`, the share of expert trainings a
cache of intervals saves in the first 12, 24 and 48 trials.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from linearsr.experts import intervals, log_snr
from linearsr.noise_profile import NoiseProfile
from linearsr.partition import CutGrid, Proposal, least_cost_intervals, propose
from linearsr_platform.cluster.boundary_search import BoundarySpace, OneBoundarySampler, boundaries_of, warm_starts

LIMIT = 200
"""Trials after which a search has failed."""
LOOKS = (12, 24, 48)
"""Trials after which the savings are counted."""
CLOSED = 0.95
NARROWEST = 4
"""Grid steps between planted jumps at least, twice what the grid allows an expert."""


@dataclass(frozen=True)
class Surface:
    """A planted score over boundaries, by the grid's steps."""

    grid: CutGrid
    curve: np.ndarray
    mass: np.ndarray
    costs: np.ndarray
    """[start, end], both included: weighted variance of the curve inside."""
    optimum: float
    single: float

    def score(self, boundaries: tuple[float, ...]) -> float:
        """Return minus the variance left inside the experts; higher is better."""
        cuts = [round((log_snr(boundary) - self.grid.low) / self.grid.step) for boundary in reversed(boundaries)]
        edges = [0, *cuts, len(self.curve)]
        return -sum(float(self.costs[start, end - 1]) for start, end in pairwise(edges))

    def closed(self, score: float) -> float:
        """Return which share of the distance from one expert to the optimum a score has closed."""
        return (score - self.single) / (self.optimum - self.single)


def plant(seed: int, experts: int, grid: CutGrid) -> Surface:
    """Draw a surface with `experts` regimes."""
    rng = np.random.default_rng([seed, experts])
    levels = int((grid.high - grid.low) / grid.step + 1e-9)
    while True:
        jumps = np.sort(rng.choice(np.arange(1, levels), experts - 1, replace=False))
        widths = np.diff([0, *jumps, levels])
        if widths.min() >= NARROWEST:
            break
    heights = np.cumsum([0.0, *(rng.choice([-1, 1], experts - 1) * rng.uniform(0.7, 1.5, experts - 1))])
    place = np.linspace(0, 1, levels)
    drift = rng.normal(0, 0.3) * place + rng.uniform(0.1, 0.3) * np.sin(2 * np.pi * (place + rng.uniform()))
    curve = np.repeat(heights, widths) + drift
    mass = 0.3 + np.exp(-0.5 * ((place - 0.45) / 0.2) ** 2)
    mass /= mass.sum()
    costs = _variances(curve, mass)
    cuts = [0, *least_cost_intervals(costs, experts, round(grid.min_width / grid.step)), levels]
    optimum = -sum(float(costs[start, end - 1]) for start, end in pairwise(cuts))
    return Surface(grid, curve, mass, costs, optimum, -float(costs[0, -1]))


def _variances(curve: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """Return the (J, J) weighted squared deviations of the levels start to end from their mean."""
    costs = np.zeros((len(curve), len(curve)))
    for start in range(len(curve)):
        weight = mass[start:].cumsum()
        first, second = (mass * curve)[start:].cumsum(), (mass * curve**2)[start:].cumsum()
        costs[start, start:] = second - first**2 / weight
    return costs


def profile_of(surface: Surface, seed: int, angle_noise: float, profile_levels: int) -> NoiseProfile:
    """Return what a measurement on a network would say about a surface: noisy, of angles instead of scores, and maybe coarse."""
    rng = np.random.default_rng([seed, 1])
    grid, levels = surface.grid, len(surface.curve)
    owner = (np.arange(levels) + 0.5) * profile_levels // levels
    share = np.array([surface.mass[owner == level].sum() for level in range(profile_levels)])
    mean = np.array([(surface.mass * surface.curve)[owner == level].sum() for level in range(profile_levels)]) / share
    noise = np.triu(rng.normal(0, angle_noise, (profile_levels, profile_levels)), 1)
    affinity = np.clip(np.cos(mean[:, None] - mean[None, :]) + noise + noise.T, -1, 1)
    np.fill_diagonal(affinity, 1)
    loss = 1 + 0.5 * np.sin(2 * np.pi * (np.arange(profile_levels) / profile_levels + rng.uniform()))
    zeros, errors = (0.0,) * profile_levels, np.where(np.eye(profile_levels), 0, angle_noise)
    return NoiseProfile(
        edges=tuple(float(edge) for edge in grid.low + grid.step * np.linspace(0, levels, profile_levels + 1)),
        mass=tuple((share / share.sum()).tolist()),
        loss=tuple(loss.tolist()),
        loss_error=zeros,
        # In proportion to the loss, so that only angles tell levels apart.
        gradient_norm=tuple(loss.tolist()),
        gradient_norm_error=zeros,
        affinity=tuple(map(tuple, affinity.tolist())),
        affinity_error=tuple(map(tuple, errors.tolist())),
        samples=64,
    )


@dataclass(frozen=True)
class Outcome:
    """What one search did on one surface."""

    needed: int | None
    saved: tuple[float, ...]


MakeSampler = Callable[[BoundarySpace, int], BaseSampler]


def search(surface: Surface, experts: int, make: MakeSampler, proposals: list[Proposal], *, seed: int, noise: float) -> Outcome:
    """Run one search until the surface's optimum is reached and all savings are counted."""
    space = BoundarySpace(grid=surface.grid, experts=(experts,))
    study = optuna.create_study(direction="maximize", sampler=make(space, seed))
    for point in warm_starts(space, proposals):
        study.enqueue_trial(point)
    rng = np.random.default_rng([seed, 2])
    needed, saved, trained = None, [], set()
    for number in range(1, LIMIT + 1):
        trial = study.ask()
        space(trial)
        boundaries = boundaries_of(trial.params, surface.grid)
        trained |= set(intervals(boundaries))
        saved += [1 - len(trained) / (number * experts)] if number in LOOKS else []
        score = surface.score(boundaries)
        if needed is None and surface.closed(score) >= CLOSED:
            needed = number
        if needed is not None and number >= max(LOOKS):
            break
        study.tell(trial, score + noise * (surface.optimum - surface.single) * rng.normal())
    return Outcome(needed, tuple(saved))


def ours(space: BoundarySpace, seed: int, **settings: float) -> BaseSampler:
    """Return the sampler under test."""
    return OneBoundarySampler(space, seed=seed, **settings)


ARMS: dict[str, tuple[MakeSampler, Callable[[Proposal], bool]]] = {
    "random": (lambda space, seed: RandomSampler(seed=seed), lambda proposal: False),
    "TPE, no proposals": (lambda space, seed: TPESampler(seed=seed), lambda proposal: False),
    "ours, no proposals": (ours, lambda proposal: False),
    "ours, all proposals": (ours, lambda proposal: True),
    "ours, all but least-conflict": (ours, lambda proposal: proposal.name != "least-conflict"),
}
"""Name -> sampler, and which proposals it starts from."""


def outcomes(
    arm: str, experts: int, seeds: range, *, noise: float, angle_noise: float, profile_levels: int, make: MakeSampler | None = None
) -> list[Outcome]:
    """Run one arm on one surface a seed."""
    sampler, wanted = ARMS[arm]
    grid, found = CutGrid(), []
    for seed in seeds:
        surface = plant(seed, experts, grid)
        proposals = propose(experts, profile=profile_of(surface, seed, angle_noise, profile_levels), grid=grid)
        found.append(search(surface, experts, make or sampler, [one for one in proposals if wanted(one)], seed=seed, noise=noise))
    return found


def row(arm: str, experts: int, found: list[Outcome]) -> str:
    """Write one line of the table."""
    needed = np.array([LIMIT + 1 if one.needed is None else one.needed for one in found])
    low, median, high = np.percentile(needed, [25, 50, 75])
    shown = [f"> {LIMIT}" if value > LIMIT else f"{value:.0f}" for value in (median, low, high)]
    saved = " | ".join(f"{value:.0%}" for value in np.mean([one.saved for one in found], axis=0))
    reached = " | ".join(f"{np.mean(needed <= limit):.0%}" for limit in (24, LIMIT))
    return f"| {experts} | {arm} | {shown[0]} ({shown[1]} to {shown[2]}) | {reached} | {saved} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--noise", type=float, default=0.02)
    parser.add_argument("--angle-noise", type=float, default=0.1)
    parser.add_argument("--profile-levels", type=int, default=63)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    print(f"| experts | search | trials | in 24 | in {LIMIT} | " + " | ".join(f"saved in {look}" for look in LOOKS) + " |")
    print("|---|---|---|---|---|" + "---|" * len(LOOKS))
    for experts in args.experts:
        for arm in ARMS:
            found = outcomes(arm, experts, seeds, noise=args.noise, angle_noise=args.angle_noise, profile_levels=args.profile_levels)
            print(row(arm, experts, found), flush=True)


if __name__ == "__main__":
    main()
