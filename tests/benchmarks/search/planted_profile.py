"""How often the least-conflict boundaries find a planted split of the noise axis. Prints a table in Markdown.

Run: `OMP_NUM_THREADS=1 python tests/benchmarks/search/planted_profile.py [--seeds 40]`, about two minutes. A small network learns targets
that change at planted boundaries. It is told the noise level weakly or not at all, so at its optimum the regimes pull its weights different
ways, and `measure_profile` sees that at 64 levels. Inside a regime the targets drift too, and losses vary a thousandfold along the axis.

A cell is the share of seeds in which all boundaries lie within 0.5 log-SNR of the planted ones; `angles alone` is least conflict without
the lengths of the gradients, the plain P2 of method.md 5.3. `noise` is that of the targets in units of their own size, `density` that of
noise levels in training and in the profile (`training`: SANA's, which hardly ever draws what lies above log-SNR 3), `samples` gradients a
level, `signal` the median of `NoiseProfile.signal_to_noise`. `trusted` is the share of seeds whose proposal does not call itself too noisy
to trust, `of these hit` how many of these are right. Settings without a bar show where it starts to fail. Exits with 1 if one misses its.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from linearsr.config import FlowConfig
from linearsr.experts import EFFECTIVE_LOG_SNR, log_snr
from linearsr.flow import interval_mass
from linearsr.noise_profile import NoiseProfile
from linearsr.partition import PROPOSALS, CutGrid, least_conflict, propose
from linearsr.profiling import level_intervals, measure_profile

LEVELS = 64
WITHIN = 0.5  # Log-SNR.
PLANTED = (-4.0, 5.0)
APART = 3.0
WIDTH = 6
BAR = 0.95
RIVALS = ("angles alone", "bisection", "uniform-time", "uniform-log-snr", "equal-loss")
EDGES = np.linspace(*EFFECTIVE_LOG_SNR, LEVELS + 1)


@dataclass(frozen=True)
class Setting:
    """One kind of planted problem."""

    experts: int
    noise: float
    density: str = "uniform"
    knows: float = 0.0
    samples: int = 8
    bar: bool = False


SETTINGS = (
    Setting(2, 1.0, knows=1.0, bar=True),
    Setting(3, 1.0, bar=True),
    Setting(2, 8.0, bar=True),
    Setting(3, 8.0, bar=True),
    Setting(3, 14.0),
    Setting(3, 24.0),
    Setting(2, 1.0, density="training"),
)


class Planted:
    """A regression problem whose targets change at planted log-SNRs."""

    def __init__(self, setting: Setting, seed: int) -> None:
        """Draw boundaries and targets."""
        self.setting = setting
        rng = np.random.default_rng([seed, setting.experts])
        self.cuts = np.zeros(2)
        while len(self.cuts) != setting.experts - 1 or (np.diff(self.cuts) < APART).any():
            self.cuts = np.sort(rng.uniform(*PLANTED, setting.experts - 1))
        self.teachers = torch.tensor(rng.standard_normal((setting.experts, WIDTH, WIDTH)) / WIDTH**0.5, dtype=torch.float32)
        self.drift = torch.tensor(rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5, dtype=torch.float32)
        self.mass = np.full(LEVELS, 1 / LEVELS)
        if setting.density == "training":
            self.mass = np.array([interval_mass(span, FlowConfig()) for span in level_intervals(EDGES.tolist())])
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network = nn.Sequential(nn.Linear(WIDTH + 1, 16), nn.Tanh(), nn.Linear(16, WIDTH))

    def loss(self, lam: Tensor, generator: torch.Generator) -> Tensor:
        """Return the mean loss of a fresh minibatch at these log-SNRs (B,)."""
        x = torch.randn(len(lam), WIDTH, generator=generator)
        regime = torch.bucketize(lam, torch.tensor(self.cuts, dtype=torch.float32))
        targets = torch.einsum("bij,bj->bi", self.teachers[regime], x) + 0.3 * torch.sin(lam / 4)[:, None] * (x @ self.drift)
        targets = targets + self.setting.noise * torch.randn(targets.shape, generator=generator)
        estimate = self.network(torch.cat([x, self.setting.knows * lam[:, None] / 8], dim=1))
        scale = 10 ** (lam / 5)
        return (scale * (estimate - targets).square().mean(dim=1)).mean()

    def loss_at(self, span: tuple[float, float], generator: torch.Generator) -> Tensor:
        """Return the loss of a minibatch inside an interval of noise levels."""
        low, high = (float(np.clip(log_snr(t), *EFFECTIVE_LOG_SNR)) for t in reversed(span))
        return self.loss(low + (high - low) * torch.rand(32, generator=generator), generator)

    def train(self, steps: int = 200) -> None:
        """Bring the network to its optimum over all levels."""
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        mass = torch.tensor(self.mass)
        for _ in range(steps):
            level = torch.multinomial(mass, 128, replacement=True, generator=generator)
            lam = EFFECTIVE_LOG_SNR[0] + (level + torch.rand(128, generator=generator)) * float(EDGES[1] - EDGES[0])
            optimizer.zero_grad()
            self.loss(lam, generator).backward()
            optimizer.step()
            schedule.step()

    def profile(self, seed: int) -> NoiseProfile:
        """Measure the network's profile."""
        return measure_profile(
            self.loss_at,
            self.network.parameters(),
            edges=EDGES.tolist(),
            mass=self.mass.tolist(),
            samples=self.setting.samples,
            sketch_size=251,
            seed=seed,
        )

    def hit(self, boundaries: tuple[float, ...]) -> bool:
        """Return whether every boundary lies where it was planted."""
        cuts = sorted(log_snr(boundary) for boundary in boundaries)
        return len(cuts) == len(self.cuts) and bool((np.abs(cuts - self.cuts) <= WITHIN).all())


@dataclass(frozen=True)
class Outcome:
    """What was found on one planted problem."""

    hits: dict[str, bool]
    trusted: bool
    signal: float


def find(setting: Setting, seed: int) -> Outcome:
    """Train, profile and cut."""
    problem = Planted(setting, seed)
    problem.train()
    profile, grid = problem.profile(seed), CutGrid()
    hits = {name: problem.hit(make(setting.experts, profile, grid) or ()) for name, make in PROPOSALS.items()}
    # Gradients of length 1 in units of the loss leave the angles.
    plain = replace(profile, gradient_norm=profile.loss, gradient_norm_error=(0.0,) * LEVELS)
    hits["angles alone"] = problem.hit(least_conflict(plain, setting.experts, grid.min_width))
    notes = [proposal.note for proposal in propose(setting.experts, profile=profile, grid=grid)]
    return Outcome(hits, not any("too noisy to trust" in note for note in notes), median(profile.signal_to_noise()))


def row(setting: Setting, outcomes: list[Outcome]) -> str:
    """Return a row of the table."""
    count = len(outcomes)
    trusted = [outcome for outcome in outcomes if outcome.trusted]
    shares = {name: sum(outcome.hits[name] for outcome in outcomes) / count for name in (*PROPOSALS, "angles alone")}
    cells = [
        *(setting.experts, f"{setting.noise:g}", setting.density, "weakly" if setting.knows else "no", setting.samples),
        f"{median(outcome.signal for outcome in outcomes):.1f}",
        f"**{shares['least-conflict']:.3f}**",
        f"{len(trusted) / count:.3f}",
        f"{sum(outcome.hits['least-conflict'] for outcome in trusted) / len(trusted):.3f}" if trusted else "-",
        *(f"{shares[name]:.3f}" for name in RIVALS),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> int:
    """Measure and print; returns 1 if a setting with a bar misses it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    columns = ["experts", "noise", "density", "knows t", "samples", "signal", "least-conflict", "trusted", "of these hit", *RIVALS]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    missed = 0
    for setting in SETTINGS:
        outcomes = [find(setting, seed) for seed in range(arguments.seeds)]
        print(row(setting, outcomes), flush=True)
        missed += setting.bar and sum(outcome.hits["least-conflict"] for outcome in outcomes) < BAR * arguments.seeds
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
