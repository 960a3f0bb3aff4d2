"""The knee detector on curves whose knee is known."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from linearsr.config import MIN_POINTS
from linearsr.knee import KneeDetector, decide_from_history
from linearsr.scatter import measure_scatter

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


def decisions(points, metrics=METRICS, **settings):
    detector = KneeDetector(metrics, **settings)
    return [detector.update(step, values) for step, values in points]


def rise_then_oscillation(length=60, onset=24):
    """A rise, done at evaluation 20, and the size of the noise: four times larger after the onset."""
    i = np.arange(length)
    return 1 - np.exp(-i / 5), np.where(i > onset, 4.0, 1.0)


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.04])
def test_rise_then_decline_is_confirmed_near_its_peak(noise):
    for seed in range(8):
        history = decisions(three_metrics(rise_then_decline(peak=15), noise, seed))
        final = history[-1]
        assert final.state == "confirmed", (seed, final)
        # Eval 15 is the peak; 95 % of the rise is done at 12.
        assert 8 * EVERY <= final.knee_step <= 18 * EVERY, (seed, final)
        assert final.knee_step < final.confirmed_at <= 31 * EVERY, (seed, final)
        assert history[3].state == "improving", (seed, history[3])
        first = next(i for i, decision in enumerate(history) if decision.state == "confirmed")
        assert final.confirmed_at == EVERY * (first + 1)
        assert all(decision == final for decision in history[first:])  # What is confirmed stays.
        low, high = final.interval
        assert low <= final.knee_step <= high <= final.onset_step


def test_oscillation_is_dated_and_an_evaluation_before_it_is_kept():
    shape, growth = rise_then_oscillation()
    for seed in range(8):
        final = decisions(three_metrics(shape, 0.04 * growth, seed))[-1]
        assert final.state == "confirmed", (seed, final)
        assert abs(final.onset_step / EVERY - 1 - 24) <= 4, (seed, final)
        assert 12 * EVERY <= final.knee_step <= 26 * EVERY, (seed, final)
        assert "oscillation" in final.reason


@pytest.mark.parametrize("shape", [0.1 * np.arange(30), np.log1p(np.arange(30)), 1 - np.exp(-np.arange(30) / 15)])
def test_a_rising_curve_is_never_confirmed(shape):
    for seed in range(8):
        history = decisions(three_metrics(shape / np.ptp(shape), 0.02, seed))
        assert all(decision.state in ("improving", "plateau") for decision in history), (seed, history[-1])


def test_a_plateau_is_no_knee_until_patience_says_so():
    shape = 1 - np.exp(-np.arange(60) / 3)
    for seed in range(8):
        points = three_metrics(shape, 0.03, seed)
        waiting, patient = decisions(points)[-1], decisions(points, patience=10)
        assert waiting.confirmed_at is None, (seed, waiting)
        final = patient[-1]
        assert final.state == "confirmed", (seed, final)
        assert final.onset_step is None
        assert final.confirmed_at >= final.knee_step + 10 * EVERY


def test_steps_upwards_are_no_oscillation():
    i = np.arange(70)
    stairs = 0.5 * (1 - np.exp(-i / 2)) + sum(0.25 * (1 - np.exp(-np.maximum(0, i - start) / 2)) for start in (18, 36, 54))
    confirmed = [decisions(three_metrics(stairs, 0.015, seed))[-1].confirmed_at for seed in range(8)]
    assert confirmed.count(None) >= 7


def test_a_rise_in_heavy_noise_is_waited_for():
    # 0.3 noise units an evaluation: four evaluations bring little more than the noise of one, thirty bring nine units.
    confirmed = [decisions(three_metrics(0.3 * np.arange(30), 1.0, seed))[-1].confirmed_at for seed in range(12)]
    assert confirmed.count(None) >= 11


def test_an_untrained_first_evaluation_does_not_dwarf_later_gains():
    shape = np.concatenate([[-60.0, -50.0], 0.02 * np.arange(16)])
    for seed in range(4):
        assert decisions(three_metrics(shape, 0.001, seed))[-1].state == "improving", seed


def test_rounded_values_do_not_pass_for_oscillation():
    for seed in range(8):
        shape = 24 + 2 * (1 - np.exp(-np.arange(60) / 4)) + 0.004 * np.random.default_rng(seed).standard_normal(60)
        assert decisions(points_of({"psnr_y": shape.round(2)}), {"psnr_y": True})[-1].confirmed_at is None, seed


def wandering_noise(rho, evaluations, metrics, seed):
    """AR(1) noise of unit variance, (evaluations, metrics)."""
    rng = np.random.default_rng(seed)
    series = np.zeros((evaluations + 50, metrics))
    for i, drawn in enumerate(rng.standard_normal(series.shape)):
        series[i] = rho * series[i - 1] + math.sqrt(1 - rho**2) * drawn
    return series[50:]


def test_wandering_noise_is_told_from_independent_noise():
    rise = 1 - np.exp(-np.arange(45)[:, None] / 6)
    measured = {rho: [measure_scatter(rise + 0.08 * wandering_noise(rho, 45, 4, seed)).rho for seed in range(20)] for rho in (0, 0.3, 0.6)}
    for rho, estimates in measured.items():
        assert abs(np.median(estimates) - max(rho, 0.15)) < 0.06, (rho, estimates)
        assert np.std(estimates) < (0.09 if rho < 0.5 else 0.13), (rho, estimates)


def test_a_constant_metric_has_noise_of_some_autocorrelation():
    assert np.isfinite(measure_scatter(np.full((20, 2), 3.0)).rho)


def test_one_bad_evaluation_is_no_oscillation_however_bad():
    final = []
    for seed in range(20):
        noise = 0.05 * wandering_noise(0.3, 26, 3, seed)
        noise[-1] -= 2.0
        curve = 1 - np.exp(-np.arange(26) / 5)
        points = points_of({name: curve + column for name, column in zip("abc", noise.T, strict=True)})
        final.append(decisions(points, dict.fromkeys("abc", True))[-1].final)
    # The noise before it may happen to decline already.
    assert sum(final) <= 2, final


def test_no_single_metric_of_three_can_confirm():
    for seed in range(6):
        points = three_metrics(1 - np.exp(-np.arange(60) / 5), 0.03, seed)
        wild = [(step, {**values, "gmsd": values["gmsd"] + 0.5 * (-1) ** i * (i > 30)}) for i, (step, values) in enumerate(points)]
        assert decisions(wild)[-1].confirmed_at is None, seed
        assert decisions(wild, {"gmsd": False})[-1].confirmed_at is not None, seed


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
    outcomes = [[(d.state, d.knee_step, d.confirmed_at, d.interval) for d in decisions(each)] for each in (points, scaled)]
    assert outcomes[0] == outcomes[1]


def test_orientation_decides_what_a_gain_is():
    rising = points_of({"m": np.arange(30.0)})
    assert decide_from_history({"m": True}, rising).state == "improving"
    falling = decide_from_history({"m": False}, points_of({"m": np.concatenate([-np.arange(12.0), -12 + np.arange(20.0)])}))
    assert 10 * EVERY <= falling.knee_step <= 13 * EVERY


def test_conflicting_metrics_settle_where_neither_gains_more():
    i = np.arange(60)
    saturating = 1 - np.exp(-i / 4)
    # Fidelity falls from 15 on; the perceptual metrics gain as much as it loses, until from 30 on all oscillate.
    drift, growth = 0.012 * np.clip(i - 15, 0, 15), np.where(i > 30, 4.0, 1.0)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        noise = {name: 0.03 * growth * rng.standard_normal(60) for name in METRICS}
        falling = {"psnr_y": saturating - drift + noise["psnr_y"], "ssim_y": saturating + drift + noise["ssim_y"]}
        final = decide_from_history(METRICS, points_of({**falling, "gmsd": 1 - saturating + noise["gmsd"]}))
        assert final.state == "confirmed", seed
        assert 10 * EVERY <= final.knee_step <= 33 * EVERY, (seed, final)


def test_divergence_is_seen_at_the_second_evaluation_and_never_chosen():
    points = three_metrics(np.arange(12) / 11, 0.001, seed=1)
    assert decisions(points)[-1].state == "improving"
    for value in (math.nan, math.inf, -math.inf):
        diverged = [*points, *((EVERY * i, dict.fromkeys(METRICS, value)) for i in (13, 14))]
        final = decisions(diverged)[-1]
        assert (final.state, final.confirmed_at) == ("diverging", 14 * EVERY), value
        assert 11 * EVERY <= final.knee_step <= 12 * EVERY, value


def test_a_collapse_to_finite_values_is_divergence_too():
    shape = np.concatenate([1 - np.exp(-np.arange(20) / 4), [-3.0, -3.2, -3.1]])
    final = decisions(three_metrics(shape, 0.02, seed=0))[-1]
    assert final.state == "diverging"
    assert final.confirmed_at <= 22 * EVERY
    assert 10 * EVERY <= final.knee_step <= 20 * EVERY


def test_one_bad_value_is_survived_and_missing_metrics_are_tolerated():
    points = three_metrics(rise_then_decline(), 0.02, seed=2)
    holed = [(step, dict(values)) for step, values in points]
    for i in range(0, len(holed), 3):
        del holed[i][1]["ssim_y"]
    holed[6][1]["gmsd"] = math.nan
    holed.insert(8, (holed[7][0] + 1, {"loss": 0.1}))  # Nothing the detector watches.
    final = decisions(holed)[-1]
    assert final.state == "confirmed"
    assert 8 * EVERY <= final.knee_step <= 17 * EVERY


def test_concluding_without_a_knee_says_what_is_best_and_why_there_is_none():
    points = three_metrics(np.arange(10) / 9, 0.01, seed=0)
    detector = KneeDetector(METRICS)
    for step, values in points:
        detector.update(step, values)
    final = detector.conclude()
    assert (final.state, final.knee_step, final.interval) == ("improving", None, None)
    assert detector.best_step() == 10 * EVERY
    assert {verdict.state for verdict in final.metrics.values()} == {"improving"}
    nothing = decide_from_history(METRICS, [(1, dict.fromkeys(METRICS, math.nan))])
    assert nothing.knee_step is None


@pytest.mark.parametrize("run", ["overfit-0", "overfit-1", "overfit-2", "quickstart-0"])
def test_recorded_curves_are_stopped_where_they_overfit_and_only_there(run):
    file = Path(__file__).parents[1] / "benchmarks" / "knee" / "curves" / f"{run}-ema-strips.csv"
    rows = list(csv.DictReader(file.open(encoding="utf-8", newline="")))
    points = [(int(row["step"]), {name: float(row[name]) for name in METRICS}) for row in rows]
    final = decide_from_history(METRICS, points)
    if run.startswith("quickstart"):
        assert (final.state, final.confirmed_at) == ("plateau", None)
    else:
        # Best at 700 to 850 of 5000 steps; what is lost at the end is 1 dB.
        assert final.state == "confirmed"
        assert 450 <= final.knee_step <= 1000
        assert final.confirmed_at <= 1600


def test_candidates_hold_what_is_chosen_later():
    """A store that keeps only the candidates always has the weights of the final choice, or those of a neighbour."""
    keep = 12
    for seed in range(6):
        shape, growth = rise_then_oscillation()
        detector, kept = KneeDetector(METRICS), []
        for step, values in three_metrics(shape, 0.04 * growth, seed):
            decision = detector.update(step, values)
            candidates = detector.candidates(keep)
            assert len(candidates) <= 0.75 * keep
            kept = [each for each in [*kept, step] if each in candidates]
            if decision.confirmed_at is not None:
                break
        assert min(abs(each - decision.knee_step) for each in kept) <= 2 * EVERY, (seed, kept, decision.knee_step)


def test_min_points_delay_confirmation_and_fewer_than_the_least_say_nothing():
    points = three_metrics(rise_then_decline(peak=6), 0.01, seed=0)
    eager, late = (decisions(points, min_points=count)[-1] for count in (MIN_POINTS, 30))
    assert eager.confirmed_at < late.confirmed_at == 30 * EVERY
    assert all(decision.knee_step is None for decision in decisions(points)[: MIN_POINTS - 1])


def test_bad_use_is_refused():
    with pytest.raises(ValueError, match=r"knee\.metrics"):
        KneeDetector({})
    detector = KneeDetector({"m": True})
    detector.update(10, {"m": 1.0})
    with pytest.raises(ValueError, match="ascending steps"):
        detector.update(10, {"m": 1.0})
