"""The measured profile against gradients that are known, and the share of training draws in an interval against draws."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from linearsr.config import FlowConfig
from linearsr.experts import noise_level
from linearsr.flow import interval_mass, sample_times
from linearsr.profiling import level_intervals, measure_profile, sketch

EDGES = (-6.0, -2.0, 0.0, 2.0, 6.0)
SIZE = 300


class Quadratic:
    """Loss |w - c - noise|^2 / 2 + 1 with its own c at every level, at w = 0: the mean gradient is -c."""

    def __init__(self, noise, seed=0):
        rng = torch.Generator().manual_seed(seed)
        self.centres = torch.randn(len(EDGES) - 1, SIZE, generator=rng) / SIZE**0.5
        self.centres[2] = 0.6 * self.centres[1] - 0.8 * self.centres[2]
        self.centres *= torch.tensor([1.0, 10.0, 0.1, 1.0])[:, None]
        self.noise = noise
        self.spans = level_intervals(EDGES)
        self.weights = [torch.zeros(200, requires_grad=True), torch.zeros(10, 10, requires_grad=True), torch.zeros(3, requires_grad=True)]

    def loss_at(self, span, generator):
        centre = self.centres[self.spans.index(span)]
        noise = self.noise * centre.norm() * torch.randn(SIZE, generator=generator) / SIZE**0.5
        return (torch.cat([one.flatten() for one in self.weights[:2]]) - centre - noise).square().sum() / 2 + 1

    def profile(self, samples, **settings):
        mass = (0.25,) * 4
        return measure_profile(self.loss_at, self.weights, edges=EDGES, mass=mass, samples=samples, **settings)

    def norms(self):
        return self.centres.norm(dim=1).numpy()

    def cosines(self):
        unit = self.centres / self.centres.norm(dim=1, keepdim=True)
        return (unit @ unit.T).numpy()


def test_norms_and_cosines_are_those_of_the_mean_gradients_within_the_stated_errors():
    found = []
    for seed in range(12):
        problem = Quadratic(noise=3.0, seed=seed)
        measured = problem.profile(24, sketch_size=401, seed=seed)
        pairs = np.triu_indices(4, 1)
        found.extend(((np.array(measured.affinity) - problem.cosines())[pairs] / np.array(measured.affinity_error)[pairs]).tolist())
        found.extend(((np.array(measured.gradient_norm) - problem.norms()) / np.array(measured.gradient_norm_error)).tolist())
    # Standard normal if estimates are unbiased and errors neither too small nor too large.
    assert abs(np.mean(found)) < 0.35
    assert 0.6 < np.std(found) < 1.3


def test_gradients_that_are_nothing_but_noise_have_no_norm_and_unknown_affinities():
    problem = Quadratic(noise=3.0)
    problem.centres[0] = 0
    wanted = problem.loss_at

    def loss_at(span, generator):
        noise = torch.randn(200, generator=generator) if span == problem.spans[0] else torch.zeros(200)
        return wanted(span, generator) + (problem.weights[0] * noise).sum()

    problem.loss_at = loss_at
    measured = problem.profile(24, sketch_size=401)
    assert measured.signal_to_noise()[0] < 2 < measured.signal_to_noise()[1]
    assert measured.affinity_error[0][1:] == (1.0, 1.0, 1.0)
    assert max(measured.affinity_error[1][1:]) < 0.5


def test_errors_shrink_with_the_root_of_the_samples():
    few, many = (Quadratic(noise=3.0).profile(samples, sketch_size=2003) for samples in (16, 256))
    for name in ("loss_error", "gradient_norm_error", "affinity_error"):
        ratio = np.sum(getattr(few, name)) / np.sum(getattr(many, name))
        assert 2.7 < ratio < 5.5, name


def test_the_seed_decides_everything_and_gradients_are_left_alone():
    problem = Quadratic(noise=1.0)
    seen = []
    first = problem.profile(4, sketch_size=101, seed=1, on_level=lambda done, total: seen.append((done, total)))
    assert first == problem.profile(4, sketch_size=101, seed=1)
    assert first.affinity != problem.profile(4, sketch_size=101, seed=2).affinity
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(one.grad is None for one in problem.weights)


def test_a_loss_that_is_not_finite_is_refused():
    problem = Quadratic(noise=float("nan"))
    with pytest.raises(ValueError, match="not finite at noise levels"):
        problem.profile(4)
    with pytest.raises(ValueError, match="got 2 samples"):
        problem.profile(2)


def test_inner_products_of_sketches_are_unbiased_also_where_one_column_holds_everything():
    generator = torch.Generator().manual_seed(0)
    first, second = ([torch.randn(8, generator=generator), torch.zeros(40, 16)] for _ in range(2))
    for one in (first, second):
        one[1][:, 3] = torch.randn(40, generator=generator) + 1
    true = sum(float((a * b).sum()) for a, b in zip(first, second, strict=True))
    products = np.array([float(sketch(first, 61, seed) @ sketch(second, 61, seed)) for seed in range(2000)])
    assert abs(products.mean() - true) < 4 * products.std() / 2000**0.5
    lengths = [sum(float(one.square().sum()) for one in each) for each in (first, second)]
    assert products.std() < 1.3 * ((lengths[0] * lengths[1] + true**2) / 61) ** 0.5


def test_level_intervals_tile_the_noise_levels():
    spans = level_intervals(EDGES)
    assert spans[0] == (noise_level(-2.0), 1.0)
    assert spans[-1] == (0.0, noise_level(2.0))
    assert all(noisier[0] == cleaner[1] for noisier, cleaner in pairwise(spans))


@pytest.mark.parametrize("flow", [FlowConfig(), FlowConfig(shift=1.0, logit_mean=0.5, logit_std=2.0, endpoint_fraction=0.25)])
def test_the_mass_of_an_interval_is_the_share_of_draws_in_it(flow):
    spans = level_intervals((-6.0, -4.0, -2.0, 0.0, 2.0, 6.0))
    masses = [interval_mass(span, flow) for span in spans]
    assert sum(masses) == pytest.approx(1, abs=1e-12)
    times = sample_times(40_000, (0.0, 1.0), flow, torch.Generator().manual_seed(0))
    shares = [float(((times >= low) & ((times < high) | (high == 1))).float().mean()) for low, high in spans]
    assert masses == pytest.approx(shares, abs=0.012)


def test_the_far_tails_keep_their_tiny_mass():
    flow = FlowConfig(shift=1.0)
    cleanest, noisiest = interval_mass((0.0, noise_level(20.0)), flow), interval_mass((noise_level(-20.0), 1.0), flow)
    # The normal tail beyond 10 standard deviations.
    assert cleanest == pytest.approx(7.62e-24, rel=1e-2)
    assert noisiest == pytest.approx(cleanest, rel=1e-3)
