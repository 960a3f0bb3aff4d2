"""The noise axis end to end: intervals tile it, draws stay where their expert is asked, and follow the density they should."""

from itertools import pairwise
from math import inf

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from linearsr.config import PAPER_BOUNDARIES, FlowConfig
from linearsr.experts import EFFECTIVE_LOG_SNR, bisect_boundaries, intervals, log_snr, noise_level, route, training_interval
from linearsr.flow import SMALLEST_TIME, interval_mass, residual_posterior, sample_times
from linearsr.schedule import shift_time, unshift_time

levels = st.floats(0, 1)
shifts = st.floats(0.05, 20)
# Boundaries far into both tails, apart by more than the step of float32 near 1.
partitions = st.lists(st.floats(-16, 16), min_size=1, max_size=5, unique_by=lambda x: round(x, 1)).map(
    lambda values: tuple(sorted(noise_level(value) for value in values))
)
densities = st.builds(FlowConfig, shift=shifts, logit_mean=st.floats(-1, 1), logit_std=st.floats(0.5, 2))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def distribution(t: torch.Tensor, config: FlowConfig) -> torch.Tensor:
    """Mass of the training density below and above noise levels t (N,), float64 (2, N): in each tail one of them is exact."""
    score = (torch.logit(unshift_time(t.double(), config.shift)) - config.logit_mean) / config.logit_std
    return torch.special.erfc(torch.stack([-score, score]) / 2**0.5) / 2


@given(partitions, levels)
@example(PAPER_BOUNDARIES, 1.0)
@example(PAPER_BOUNDARIES, 0.0)
def test_intervals_tile_the_axis_without_gap_or_overlap(boundaries: tuple[float, ...], t: float) -> None:
    tiles = intervals(boundaries)
    assert (tiles[0][1], tiles[-1][0]) == (1.0, 0.0)
    assert all(noisier[0] == cleaner[1] for noisier, cleaner in pairwise(tiles))
    assert [low <= t < high or t == high == 1 for low, high in tiles].count(True) == 1


@settings(deadline=None)
@given(partitions, densities, st.sampled_from([0.0, 0.3]))
def test_every_draw_is_routed_to_the_expert_that_trains_on_it(boundaries: tuple[float, ...], density: FlowConfig, at_end: float) -> None:
    config = FlowConfig(shift=density.shift, logit_mean=density.logit_mean, logit_std=density.logit_std, endpoint_fraction=at_end)
    for index in range(len(boundaries) + 1):
        interval = training_interval(index, boundaries, 0.0)
        assert interval == intervals(boundaries)[index]
        # The paper's edges are no float32 numbers: a draw that is rounded across one would train another expert's levels.
        assert {route(t, boundaries) for t in sample_times(64, interval, config, generator()).tolist()} == {index}


@settings(deadline=None)
@given(partitions, densities, st.floats(0, 1))
def test_draws_never_leave_their_interval_with_overlap(boundaries: tuple[float, ...], config: FlowConfig, overlap: float) -> None:
    for index in range(len(boundaries) + 1):
        low, high = training_interval(index, boundaries, overlap)
        times = sample_times(64, (low, high), config, generator()).double()
        assert times.min() >= max(low, SMALLEST_TIME)
        assert times.max() <= high


@settings(deadline=None)
@given(partitions, densities)
@example(PAPER_BOUNDARIES, FlowConfig(shift=3.0))
@example((0.97, 0.999), FlowConfig(shift=0.05))
def test_draws_follow_the_truncated_density(boundaries: tuple[float, ...], config: FlowConfig) -> None:
    count = 2000
    for low, high in intervals(boundaries):
        if low < SMALLEST_TIME or high - low < 1e-4:
            continue  # Float32 has too few numbers in it for a smooth distribution.
        times = sample_times(count, (low, high), config, generator()).double().sort().values
        below, above = distribution(torch.cat([torch.tensor([low, high], dtype=torch.float64), times]), config)
        mass = above[0] - above[1] if below[0] > 0.5 else below[1] - below[0]
        rank = (above[0] - above[2:] if below[0] > 0.5 else below[2:] - below[0]) / mass
        steps = torch.arange(count + 1, dtype=torch.float64) / count
        distance = torch.maximum(rank - steps[:-1], steps[1:] - rank).max()
        # Kolmogorov-Smirnov: one sample in a hundred thousand lies farther away.
        assert distance < 2.47 / count**0.5
        assert interval_mass((low, high), config) == pytest.approx(float(mass), rel=1e-9)


def test_the_detail_expert_draws_from_its_own_sliver_of_the_density() -> None:
    masses = [interval_mass(interval, FlowConfig(shift=3.0)) for interval in intervals(PAPER_BOUNDARIES)]
    assert masses == pytest.approx([0.051, 0.147, 0.792, 0.0095], abs=6e-4)  # method.md 3.6
    assert sum(masses) == pytest.approx(1)


@given(st.floats(0.05, 0.95), shifts, st.floats(0.1, 8), st.floats(0.1, 8))
def test_bisection_does_not_depend_on_the_shift(anchor: float, shift: float, below: float, above: float) -> None:
    middle = log_snr(anchor)
    shifted = bisect_boundaries(anchor, log_snr_min=middle - below, log_snr_max=middle + above)
    # The same split of the unshifted axis, whose log-SNR is larger by 2 ln s everywhere.
    plain = unshift_time(anchor, shift)
    moved = log_snr(plain) - middle
    unshifted = bisect_boundaries(plain, log_snr_min=middle - below + moved, log_snr_max=middle + above + moved)
    assert tuple(shift_time(u, shift) for u in unshifted) == pytest.approx(shifted, rel=1e-9)


def test_bisection_finds_the_papers_constants_from_log_snr_alone() -> None:
    low, high = EFFECTIVE_LOG_SNR
    anchor = log_snr(0.875)
    assert [round(noise_level(value), 3) for value in ((high + anchor) / 2, anchor, (low + anchor) / 2)] == [0.223, 0.875, 0.939]


@given(levels, shifts)
@example(1.0, 0.1)
@example(5e-324, 20.0)
@example(1 - 2**-53, 0.05)
def test_no_rounding_leaves_the_axis(t: float, shift: float) -> None:
    for moved in (shift_time(t, shift), unshift_time(t, shift)):
        assert 0 <= moved <= 1
        assert (moved in (0, 1)) or 0 < t < 1
    assert 0 <= noise_level(log_snr(t)) <= 1


@pytest.mark.parametrize(("value", "t"), [(-inf, 1.0), (inf, 0.0), (1e308, 0.0), (-1e308, 1.0), (3000.0, 0.0)])
def test_extreme_log_snr_has_a_noise_level(value: float, t: float) -> None:
    assert noise_level(value) == t


@given(st.floats(0.001, 5), st.floats(0, 1), st.floats(-3, 3))
@example(0.4, 0.0, 1.0)
@example(0.4, 1.0, 1.0)
def test_the_residuals_posterior_is_that_of_brute_force(sigma: float, t: float, score: float) -> None:
    # `excess` as far from 0 as its own deviation makes likely; float32, as training has it, must not matter.
    excess = score * (((1 - t) * sigma) ** 2 + t**2) ** 0.5
    mean, deviation = residual_posterior(*(torch.tensor(value).view(1, 1, 1, 1) for value in (excess, t, sigma)))
    if t < 1e-3:  # There is nothing left to integrate over: z_t tells r outright.
        assert mean.item() == pytest.approx(excess, abs=5 * t + 1e-3 * sigma)
        return
    # Bayes' rule on a grid: prior times likelihood of what was seen, where the product has any weight.
    spread = min(sigma, t / max(1 - t, 1e-9))
    r = torch.linspace(-8 * sigma, 8 * sigma, max(4001, int(400 * sigma / spread)), dtype=torch.float64)
    logs = -(r**2) / (2 * sigma**2) - (excess - (1 - t) * r) ** 2 / (2 * t**2)
    weights = torch.softmax(logs, dim=0)
    expected = (weights * r).sum()
    assert mean.item() == pytest.approx(expected.item(), abs=1e-4 * sigma)
    assert deviation.item() == pytest.approx((weights * (r - expected) ** 2).sum().sqrt().item(), rel=1e-3)
