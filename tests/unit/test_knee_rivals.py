"""The rules the knee detector is measured against, on curves whose answer follows by hand."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "knee" / "rivals.py"
SPEC = importlib.util.spec_from_file_location("rivals", FILE)
rivals = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(rivals)

EVERY = 100  # Steps between evaluations; evaluation 0 is step 0.
PEAK = [*range(11), *range(9, -31, -1)]  # Rises by 1 to 10 at evaluation 10, then falls by 1.
ONLINE = sorted(set(rivals.RIVALS) - rivals.HINDSIGHT)


def points_of(values, name="psnr"):
    return [(EVERY * i, {name: float(value)}) for i, value in enumerate(values)]


def choose(rule, values):
    choice = rivals.RIVALS[rule](points_of(values), {"psnr": True})
    return choice.selected, choice.stopped_at


@pytest.mark.parametrize(
    ("rule", "stops"),
    [
        ("patience 5", 15),
        ("patience 10", 20),
        ("patience 20", 30),
        ("GL 5 %", 11),  # 1 below the best of a range of 10.
        ("GL 20 %", 13),  # 2 below is 20 % and not above it.
        # Strips end at 4, 9, 14, ... At 14: GL 40, errors 1 to 1.4, so P 200. At 19: GL 90, errors 1.5 to 1.9, so P 133.
        ("PQ 0.5", 19),
        ("UP 2", 19),  # Ends of strips: 4, 9, 6, 1, -4.
        ("UP 3", 24),
    ],
)
def test_each_online_rule_stops_where_its_definition_says_and_restores_the_peak(rule, stops):
    assert choose(rule, PEAK) == (10 * EVERY, stops * EVERY)


@pytest.mark.parametrize("rule", ONLINE)
def test_what_never_triggers_takes_the_best_of_the_whole_curve(rule):
    assert choose(rule, range(40)) == (39 * EVERY, None)


def test_argmax_takes_the_best_whatever_comes_after():
    assert choose("argmax (hindsight)", [0, 1, 2, 9, 2, 1, 2, 1, 3]) == (3 * EVERY, None)


def test_kneedle_finds_the_bend_and_is_not_drawn_to_the_maximum():
    bend = [*range(11), *(10 + 0.01 * i for i in range(1, 31))]
    selected, stopped_at = choose("Kneedle (hindsight)", bend)
    assert abs(selected - 10 * EVERY) <= EVERY  # Smoothing rounds the corner.
    assert stopped_at is None
    assert choose("argmax (hindsight)", bend) == (40 * EVERY, None)


@pytest.mark.parametrize("rule", ONLINE)
def test_no_online_rule_looks_ahead(rule):
    rng = np.random.default_rng(5)
    rise = 1 - np.exp(-np.arange(60) / 6)
    curve = [(EVERY * i, {"a": r + 0.05 * rng.normal(), "b": 9 - 4 * r + 0.3 * rng.normal()}) for i, r in enumerate(rise)]
    curve += [(EVERY * (60 + i), {"a": 1 - 0.02 * i, "b": 5 + 0.1 * i}) for i in range(30)]
    choice = rivals.RIVALS[rule](curve, {"a": True, "b": False})
    assert choice.stopped_at is not None
    seen = [point for point in curve if point[0] <= choice.stopped_at]
    assert rivals.RIVALS[rule](seen, {"a": True, "b": False}) == choice


@pytest.mark.parametrize("rule", rivals.RIVALS)
def test_units_orientation_and_empty_evaluations_change_nothing(rule):
    up = rivals.RIVALS[rule](points_of(PEAK), {"psnr": True})
    gaps = [point for step, values in points_of([8 - 0.25 * v for v in PEAK]) for point in ((step, values), (step + 1, {}))]
    assert rivals.RIVALS[rule](gaps, {"psnr": False}) == up
    assert rivals.RIVALS[rule]([(0, {}), (1, {})], {"psnr": True}) == rivals.Choice(None, None)


def test_a_value_that_is_not_finite_is_worse_than_any():
    values = [0.0, 5.0, 6.0, 7.0, float("nan"), float("inf"), float("-inf"), *[float("nan")] * 3]
    assert choose("patience 5", values) == (3 * EVERY, 8 * EVERY)
    assert choose("GL 5 %", values) == (3 * EVERY, 4 * EVERY)
