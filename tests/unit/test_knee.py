"""The knee detector on curves whose knee is known."""

import math

import numpy as np
import pytest

from linearsr.knee import KneeDetector, decide_from_history

METRICS = {"psnr_y": True, "ssim_y": True, "gmsd": False}
EVERY = 50  # Training steps between evaluations.


def points_of(curves):
    """Turn metric -> values into the (step, values) points that training feeds."""
    length = len(next(iter(curves.values())))
    return [(EVERY * (i + 1), {name: float(curve[i]) for name, curve in curves.items()}) for i in range(length)]


def three_metrics(shape, noise, seed):
    """One shape seen by three metrics of different units and orientation, each with its own noise (in units of the shape)."""
    rng = np.random.default_rng(seed)
    units = {"psnr_y": (24.0, 0.8), "ssim_y": (0.66, 0.04), "gmsd": (0.12, -0.02)}
    return points_of({name: base + unit * (shape + noise * rng.standard_normal(len(shape))) for name, (base, unit) in units.items()})


def rise_then_decline(length=40, peak=15):
    i = np.arange(length)
    return np.where(i <= peak, 1 - np.exp(-i / 4), 1 - np.exp(-peak / 4) - 0.03 * (i - peak))


def decisions(points, metrics=METRICS, patience=4, min_points=4):
    detector = KneeDetector(metrics, patience=patience, min_points=min_points)
    return [detector.update(step, values) for step, values in points]


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.06])
def test_rise_then_decline_is_confirmed_near_its_peak(noise):
    for seed in range(8):
        history = decisions(three_metrics(rise_then_decline(peak=15), noise, seed))
        final = history[-1]
        assert final.state == "confirmed", (seed, final)
        # Eval 15 is the peak; 95 % of the rise is done at 12. One evaluation past it is within the noise.
        assert 9 * EVERY <= final.knee_step <= 17 * EVERY, (seed, final)
        assert final.knee_step < final.confirmed_at <= 31 * EVERY, (seed, final)
        assert history[3].state == "improving", (seed, history[3])
        first = next(i for i, decision in enumerate(history) if decision.state == "confirmed")
        assert final.confirmed_at == EVERY * (first + 1)
        assert set(history[first:]) == {final}  # What is confirmed stays.


@pytest.mark.parametrize("shape", [0.1 * np.arange(30), np.log1p(np.arange(30)), 1 - np.exp(-np.arange(30) / 15)])
def test_a_rising_curve_is_never_confirmed(shape):
    for seed in range(8):
        history = decisions(three_metrics(shape / np.ptp(shape), 0.02, seed))
        assert all(decision.state != "confirmed" for decision in history), (seed, history[-1])


def test_a_rise_in_heavy_noise_is_waited_for():
    # 0.3 noise units an evaluation: four evaluations bring little more than the noise of one, thirty bring nine units.
    confirmed = [decisions(three_metrics(0.3 * np.arange(30), 1.0, seed))[-1].state == "confirmed" for seed in range(12)]
    assert sum(confirmed) <= 2


def test_an_untrained_first_evaluation_does_not_dwarf_later_gains():
    shape = np.concatenate([[-60.0, -50.0], 0.02 * np.arange(16)])
    for seed in range(4):
        assert decisions(three_metrics(shape, 0.001, seed))[-1].state == "improving", seed


def test_a_plateau_is_confirmed_and_its_earliest_part_chosen():
    shape = 1 - np.exp(-np.arange(40) / 3)
    for seed in range(8):
        final = decisions(three_metrics(shape, 0.03, seed))[-1]
        assert final.state == "confirmed", (seed, final)
        assert 5 * EVERY <= final.knee_step <= 20 * EVERY, (seed, final)


def test_a_decision_depends_on_no_later_point_and_repeats():
    points = three_metrics(rise_then_decline(), 0.05, seed=3)
    whole = decisions(points)
    for i in range(len(points)):
        assert decisions(points[: i + 1])[i] == whole[i]
    poisoned = [*points[:10], *((step, dict.fromkeys(METRICS, 1e9)) for step, _ in points[10:])]
    assert decisions(poisoned)[:10] == whole[:10]


def test_units_and_offsets_of_metrics_do_not_matter():
    points = three_metrics(rise_then_decline(), 0.05, seed=5)
    scaled = [(step, {"psnr_y": 1e3 * v["psnr_y"] - 7, "ssim_y": v["ssim_y"] / 50, "gmsd": v["gmsd"] * 3 + 100}) for step, v in points]
    outcomes = [[(d.state, d.knee_step, d.confirmed_at) for d in decisions(each)] for each in (points, scaled)]
    assert outcomes[0] == outcomes[1]


def test_orientation_decides_what_a_gain_is():
    rising = points_of({"m": rise_then_decline()})
    up, down = (decide_from_history({"m": higher}, rising, patience=4, min_points=4) for higher in (True, False))
    assert up.knee_step > 8 * EVERY
    assert down.knee_step == EVERY  # Lower is better, so the first evaluation was the best.


def test_conflicting_metrics_settle_where_neither_gains_more():
    i = np.arange(40)
    rng = np.random.default_rng(0)
    saturating = 1 - np.exp(-i / 4)
    # Fidelity peaks at 10 and falls; the perceptual metric gains as much as fidelity loses from there on.
    falling = saturating - 0.04 * np.maximum(0, i - 10)
    gaining = 1 - saturating - 0.04 * np.maximum(0, i - 10)
    curves = {"psnr_y": falling + 0.02 * rng.standard_normal(40), "gmsd": gaining + 0.02 * rng.standard_normal(40)}
    final = decide_from_history({"psnr_y": True, "gmsd": False}, points_of(curves), patience=4, min_points=4)
    assert final.state == "confirmed"
    assert 6 * EVERY <= final.knee_step <= 22 * EVERY


def test_divergence_is_a_decline_confirmed_at_the_second_and_never_chosen():
    points = three_metrics(np.arange(12) / 11, 0.001, seed=1)
    assert decisions(points)[-1].state == "improving"
    for value in (math.nan, math.inf, -math.inf):
        diverged = [*points, *((EVERY * i, dict.fromkeys(METRICS, value)) for i in (13, 14))]
        final = decisions(diverged)[-1]
        assert (final.state, final.knee_step, final.confirmed_at) == ("confirmed", 12 * EVERY, 14 * EVERY), value
        assert "decline" in final.reason, value


def test_one_bad_value_is_survived_and_missing_metrics_are_tolerated():
    points = three_metrics(rise_then_decline(), 0.02, seed=2)
    holed = [(step, dict(values)) for step, values in points]
    for i in range(0, len(holed), 3):
        del holed[i][1]["ssim_y"]
    holed[6][1]["gmsd"] = math.nan
    holed.insert(8, (holed[7][0] + 1, {"loss": 0.1}))  # Nothing the detector watches.
    final = decisions(holed)[-1]
    assert final.state == "confirmed"
    assert 9 * EVERY <= final.knee_step <= 17 * EVERY


def test_concluding_without_confirmation_takes_the_best_and_says_so():
    points = three_metrics(np.arange(10) / 9, 0.01, seed=0)
    final = decide_from_history(METRICS, points, patience=4, min_points=4)
    assert final.state == "improving"
    assert final.knee_step == 10 * EVERY
    assert "not confirmed" in final.reason
    nothing = decide_from_history(METRICS, [(1, dict.fromkeys(METRICS, math.nan))], patience=4, min_points=4)
    assert nothing.knee_step is None


def test_patience_and_min_points_delay_confirmation():
    points = three_metrics(rise_then_decline(peak=6), 0.01, seed=0)
    eager, patient, late = (decisions(points, patience=p, min_points=m)[-1] for p, m in ((3, 4), (9, 4), (3, 30)))
    assert eager.confirmed_at < patient.confirmed_at
    assert late.confirmed_at == 30 * EVERY


def test_bad_use_is_refused():
    with pytest.raises(ValueError, match=r"knee\.metrics"):
        KneeDetector({}, patience=4, min_points=4)
    detector = KneeDetector({"m": True}, patience=4, min_points=4)
    detector.update(10, {"m": 1.0})
    with pytest.raises(ValueError, match="ascending steps"):
        detector.update(10, {"m": 1.0})
