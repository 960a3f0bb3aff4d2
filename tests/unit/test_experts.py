"""The expert split: boundaries, routing and training intervals agree with each other and with the paper."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linearsr.config import PAPER_BOUNDARIES, FlowConfig
from linearsr.experts import bisect_boundaries, intervals, log_snr, noise_level, route, steps_per_expert, training_interval
from linearsr.flow import sample_times, shift_time, unshift_time

levels = st.floats(0, 1)
partitions = st.lists(st.floats(0.01, 0.99), min_size=0, max_size=5, unique=True).map(lambda ts: tuple(sorted(ts)))


def test_bisection_gives_the_papers_boundaries_to_three_digits() -> None:
    assert bisect_boundaries() == pytest.approx(PAPER_BOUNDARIES, abs=5e-4)


def test_bisection_refuses_an_anchor_outside_the_range() -> None:
    with pytest.raises(ValueError, match=r"experts\.anchor: got 0\.9999"):
        bisect_boundaries(0.9999)


@given(levels)
def test_log_snr_inverts(t: float) -> None:
    assert noise_level(log_snr(t)) == pytest.approx(t, abs=1e-12)


@given(partitions, levels)
def test_every_noise_level_belongs_to_the_interval_of_its_expert_and_to_no_other(boundaries: tuple[float, ...], t: float) -> None:
    owners = [i for i, (low, high) in enumerate(intervals(boundaries)) if low <= t < high or t == high == 1]
    assert owners == [route(t, boundaries)]


def test_a_boundary_belongs_to_the_noisier_expert() -> None:
    assert [route(t, PAPER_BOUNDARIES) for t in (1.0, 0.939, 0.938, 0.875, 0.223, 0.222, 0.0)] == [0, 0, 1, 1, 2, 3, 3]


@given(partitions.filter(bool), st.floats(0, 1))
def test_training_reaches_past_inner_edges_by_the_overlap_in_log_snr(boundaries: tuple[float, ...], overlap: float) -> None:
    for index, (low, high) in enumerate(intervals(boundaries)):
        wide_low, wide_high = training_interval(index, boundaries, overlap)
        assert wide_low == 0 if low == 0 else log_snr(wide_low) == pytest.approx(log_snr(low) + overlap)
        assert wide_high == 1 if high == 1 else log_snr(wide_high) == pytest.approx(log_snr(high) - overlap)


@given(levels, st.floats(0.1, 10))
def test_shift_inverts(u: float, shift: float) -> None:
    assert unshift_time(shift_time(u, shift), shift) == pytest.approx(u, abs=1e-9)


@pytest.mark.parametrize("interval", intervals(PAPER_BOUNDARIES))
def test_times_stay_inside_their_interval_and_follow_the_truncated_density(interval: tuple[float, float]) -> None:
    config = FlowConfig(shift=3.0)
    times = sample_times(20_000, interval, config, torch.Generator().manual_seed(0))
    assert interval[0] <= times.min()
    assert times.max() <= interval[1]
    # Reference: the untruncated density, filtered. Kolmogorov-Smirnov distance of two samples of this size: 0.02 at p < 1e-3.
    z = torch.randn(2_000_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u = torch.sigmoid(z)
    everywhere = 3 * u / (1 + 2 * u)
    reference = everywhere[(everywhere >= interval[0]) & (everywhere <= interval[1])].sort().values
    rank = torch.searchsorted(reference, times.double().sort().values) / len(reference)
    distance = (rank - torch.linspace(0, 1, len(times), dtype=torch.float64)).abs().max()
    assert distance < 0.025


def test_the_noisy_end_gets_its_share_of_draws() -> None:
    times = sample_times(10_000, (0.9, 1.0), FlowConfig(endpoint_fraction=0.3), torch.Generator().manual_seed(0))
    assert (times == 1.0).float().mean() == pytest.approx(0.3, abs=0.02)


def test_idle_experts_are_counted() -> None:
    assert steps_per_expert((1.0, 0.9, 0.5), PAPER_BOUNDARIES) == (1, 1, 1, 0)
