"""The grid of boundaries, the exact split into intervals, and what proposals make of a profile."""

import json
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from linearsr.experts import EFFECTIVE_LOG_SNR, bisect_boundaries, log_snr, noise_level
from linearsr.noise_profile import NoiseProfile
from linearsr.partition import (
    CutGrid,
    bisection,
    conflict,
    equal_loss,
    least_conflict,
    least_conflict_ranges,
    least_cost_intervals,
    propose,
)

GRIDS = st.builds(CutGrid, step=st.sampled_from([0.1, 0.25, 0.3, 1.0]), min_width=st.sampled_from([0.2, 0.5, 0.7]))


def profile(cuts=(8,), levels=16, between=-0.5, error=0.0, **changes):
    """Levels that agree up to a cut and not across it."""
    group = np.searchsorted(cuts, np.arange(levels), side="right")
    affinity = np.where(group[:, None] == group[None, :], 1.0, between)
    told = {
        "edges": tuple(np.linspace(-7, 9, levels + 1).tolist()),
        "mass": (1 / levels,) * levels,
        "loss": (1.0,) * levels,
        "loss_error": (0.0,) * levels,
        "gradient_norm": (1.0,) * levels,
        "gradient_norm_error": (error,) * levels,
        "affinity": tuple(tuple(row) for row in affinity.tolist()),
        "affinity_error": tuple(tuple(row) for row in np.where(np.eye(levels), 0.0, error).tolist()),
        "samples": 16,
    }
    return NoiseProfile(**(told | changes))


def cuts_of(boundaries):
    return tuple(sorted(log_snr(boundary) for boundary in boundaries))


@st.composite
def offsets(draw):
    grid, experts = draw(GRIDS), draw(st.integers(1, 6))
    return grid, tuple(draw(st.lists(st.integers(0, grid.slack(experts)), min_size=experts - 1, max_size=experts - 1)))


@given(offsets())
def test_any_offsets_in_any_order_are_ordered_boundaries_of_wide_enough_experts(drawn):
    grid, chosen = drawn
    boundaries = grid.boundaries(chosen)
    assert boundaries == grid.boundaries(chosen[::-1])
    assert list(boundaries) == sorted(boundaries)
    edges = (grid.low, *cuts_of(boundaries), grid.high)
    assert min(high - low for low, high in pairwise(edges)) >= grid.min_width - 1e-9


@given(offsets())
def test_offsets_come_back_from_their_boundaries(drawn):
    grid, chosen = drawn
    assert grid.offsets(grid.boundaries(chosen)) == tuple(sorted(chosen))


@given(st.integers(1, 3), st.data())
def test_the_offsets_of_any_boundaries_are_the_nearest_on_the_grid(count, data):
    grid = CutGrid(step=2.0, min_width=2.0)
    cuts = sorted(data.draw(st.lists(st.floats(-9, 11), min_size=count, max_size=count)))
    slack = grid.slack(count + 1)

    def distance(chosen):
        return sum((ours - cut) ** 2 for ours, cut in zip(cuts_of(grid.boundaries(chosen)), cuts, strict=True))

    found = grid.offsets([noise_level(cut) for cut in reversed(cuts)])
    every = [one for one in np.ndindex(*(slack + 1,) * count) if list(one) == sorted(one)]
    assert distance(found) <= min(map(distance, every)) + 1e-6


def test_a_grid_without_room_says_why():
    with pytest.raises(ValueError, match=r"got 32 experts x 2 steps of 0\.25 .* = 64; expected at most the 63 steps"):
        CutGrid().slack(32)
    with pytest.raises(ValueError, match=r"got offsets \(0, 56, 3\); expected whole numbers in \[0, 55\]"):
        CutGrid().boundaries((0, 56, 3))


def test_bisection_is_the_papers_and_goes_on_halving_the_widest():
    assert bisection(1) == ()
    assert bisection(2) == (0.875,)
    assert bisection(3) == pytest.approx((0.223, 0.875), abs=5e-4)
    assert bisection(4) == pytest.approx(bisect_boundaries(0.875), abs=1e-12)
    # The paper's two wide intervals, 6.388 each, are halved before its two narrow ones; the noisier first.
    assert cuts_of(bisection(5))[2] == pytest.approx((log_snr(0.875) + log_snr(0.223)) / 2, abs=2e-3)
    assert cuts_of(bisection(6))[4] == pytest.approx((log_snr(0.223) + EFFECTIVE_LOG_SNR[1]) / 2, abs=2e-3)


@given(st.data())
def test_the_split_is_as_good_as_the_best_of_all_and_the_earliest_of_these(data):
    levels = data.draw(st.integers(1, 7))
    min_levels = data.draw(st.integers(1, levels))
    count = data.draw(st.integers(1, levels // min_levels))
    # Few different whole numbers, so that ties are common and sums exact.
    costs = np.array(
        data.draw(st.lists(st.lists(st.integers(0, 3), min_size=levels, max_size=levels), min_size=levels, max_size=levels)), float
    )
    best = min(
        (sum(costs[start, end - 1] for start, end in pairwise((0, *cuts, levels))), cuts)
        for cuts in combinations(range(1, levels), count - 1)
        if all(end - start >= min_levels for start, end in pairwise((0, *cuts, levels)))
    )
    assert least_cost_intervals(costs, count, min_levels) == best[1]


def test_a_split_into_more_intervals_than_fit_is_refused():
    with pytest.raises(ValueError, match="got 3 intervals x 3 levels; expected at least 1 of each and at most 8 together"):
        least_cost_intervals(np.zeros((8, 8)), 3, 3)


def test_least_conflict_cuts_where_gradients_turn_and_nothing_is_left():
    measured = profile(cuts=(3, 10))
    boundaries = least_conflict(measured, 3, 0.5)
    assert cuts_of(boundaries) == pytest.approx((measured.edges[3], measured.edges[10]))
    assert conflict(measured, boundaries) == pytest.approx(0, abs=1e-12)
    assert conflict(measured, ()) == 1
    assert 0 < conflict(measured, least_conflict(measured, 2, 0.5)) < 1


def test_a_turn_among_gradients_that_are_almost_zero_does_not_attract_a_cut():
    """Of two turns, one lies where the loss can hardly be improved; angles alone would prefer it, as it divides more evenly."""
    norms = np.where(np.arange(16) < 10, 0.01, 1.0)
    measured = profile(cuts=(7, 10), gradient_norm=tuple(norms.tolist()))
    assert cuts_of(least_conflict(measured, 2, 0.5)) == pytest.approx([measured.edges[10]])


def test_lengths_that_are_nothing_but_noise_leave_the_angles_to_decide():
    """The last two levels look long; where errors explain that, they are not worth an expert of their own."""
    norms = tuple(np.where(np.arange(16) < 14, 1.0, 5.0).tolist())
    for error, cut in ((0.0, 14), (3.0, 6)):
        measured = profile(cuts=(6, 14), between=0.0, gradient_norm=norms, gradient_norm_error=(error,) * 16)
        assert cuts_of(least_conflict(measured, 2, 0.5)) == pytest.approx([measured.edges[cut]])


def test_the_scale_of_the_loss_does_not_matter():
    scale = np.geomspace(1e-3, 1e3, 16)
    measured = profile(cuts=(5,), loss=tuple(scale.tolist()), gradient_norm=tuple(scale.tolist()))
    assert cuts_of(least_conflict(measured, 2, 0.5)) == pytest.approx([measured.edges[5]])


def test_levels_that_are_hardly_ever_drawn_do_no_harm():
    mass = np.where(np.arange(16) < 12, 1 / 12, 1e-25)
    measured = profile(cuts=(5, 13), mass=tuple((mass / mass.sum()).tolist()))
    assert cuts_of(least_conflict(measured, 2, 0.5)) == pytest.approx([measured.edges[5]])


def test_a_boundary_inside_a_level_counts_by_width():
    measured = profile(cuts=(8,))
    at, above = (conflict(measured, [noise_level(measured.edges[8] + part)]) for part in (0.0, 0.5))
    # Half a level of the second group, 1/32, shares an expert with the first, 16/32: twice their product times 1.5 over their sum.
    alone = 2 * 0.25 * 1.5
    assert at == pytest.approx(0, abs=1e-12)
    assert above == pytest.approx(2 * (16 / 32) * (1 / 32) * 1.5 / (17 / 32) / alone)


def test_equal_loss_gives_every_expert_the_same_share():
    measured = profile(levels=4, loss=(3.0, 1.0, 1.0, 1.0))
    assert cuts_of(equal_loss(measured, 2)) == pytest.approx([-3.0])
    assert cuts_of(equal_loss(measured, 3)) == pytest.approx([-7 + 4 * 2 / 3, 1.0])


def test_proposals_say_when_the_profile_is_too_noisy():
    def note(measured):
        return next(one.note for one in propose(2, profile=measured, grid=CutGrid()) if one.name == "least-conflict")

    assert "too noisy" not in note(profile(cuts=(6,), error=0.05))
    assert "too noisy to trust" in note(profile(cuts=(6,), between=0.7, error=4.0))
    ((low, high),) = least_conflict_ranges(profile(cuts=(6,), error=0.05), 2, 0.5)
    assert low <= -1 <= high


def test_proposals_need_a_profile_only_where_they_use_one_and_never_repeat():
    names = [one.name for one in propose(4, profile=None, grid=CutGrid())]
    assert names == ["bisection", "uniform-time", "uniform-log-snr"]
    assert len(propose(1, profile=profile(), grid=CutGrid())) == 1
    found = [one.boundaries for one in propose(4, profile=profile(), grid=CutGrid())]
    assert len(found) == 5 == len(set(found))


def test_a_profile_comes_back_from_json():
    measured = profile(error=0.1, source={"weights": "knee"})
    assert NoiseProfile.from_json(json.loads(json.dumps(measured.to_json()))) == measured


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edges": [0.0, 1.0]}, "profile.edges: got 2; expected 17"),
        ({"edges": [0.0] * 17}, "ascending log-SNR"),
        ({"mass": [0.1] * 16}, "profile.mass: got 1.6"),
        ({"loss": [0.0] * 16}, "positive losses"),
        ({"loss": [float("nan")] * 16}, "profile.loss: got .nan.; expected finite numbers"),
        ({"loss": "high"}, "profile.loss: got 'high'; expected a list"),
        ({"affinity": [[1.0]] * 16}, "profile.affinity: got rows of another length"),
        ({"affinity": [[2.0] * 16] * 16}, r"cosines in \[-1, 1\]"),
        ({"samples": "many"}, "profile.samples: got 'many'; expected a whole number"),
        ({"color": 1}, "color"),
    ],
)
def test_a_broken_profile_is_refused_with_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        NoiseProfile.from_json(profile().to_json() | changes)


def test_something_else_than_a_profile_is_refused():
    with pytest.raises(ValueError, match="profile: got list without"):
        NoiseProfile.from_json([])
    short = profile().to_json()
    del short["affinity"]
    with pytest.raises(ValueError, match=r"without \['affinity'\]"):
        NoiseProfile.from_json(short)
