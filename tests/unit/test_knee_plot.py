"""The picture of a knee, by what a viewer can see in its pixels."""

import math

import numpy as np
import pytest
from PIL import Image

from linearsr.knee import KneeDecision, MetricVerdict
from linearsr_platform.report.knee_plot import plot_knee

GREEN, ORANGE, VERMILION = (0, 158, 115), (230, 159, 0), (213, 94, 0)  # Knee, onset, not finite.


def points_of(count, names, length=40):
    rng = np.random.default_rng(count)
    rise = 1 - np.exp(-np.arange(length) / 5)
    return [(100 * i, {name: float(rise[i] + 0.02 * rng.standard_normal()) for name in names[:count]}) for i in range(length)]


def decision(names, state="confirmed"):
    if state == "improving":
        return KneeDecision("improving", None, None, None, None, "still rising", {n: MetricVerdict("improving", 3900, None) for n in names})
    verdicts = {name: MetricVerdict(state, 1500, 2000) for name in names}
    return KneeDecision(state, 1500, 2400, 2000, (1200, 1700), "it got worse " * 60, verdicts)


def pixels_near(path, color, reach=6):
    """Return the columns of pixels whose colour is `color`."""
    with Image.open(path) as image:
        array = np.asarray(image.convert("RGB")).astype(int)
    return np.flatnonzero((np.abs(array - color).max(axis=2) <= reach).sum(axis=0) > 100)


NAMES = ["psnr_y", "lpips", "cost $x_1$ and $", "d", "e", "f", "g"]


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_confirmed_knee_is_left_of_its_onset_in_a_picture_of_1200_by_800(tmp_path, count):
    path = tmp_path / "deep" / "knee.png"
    plot_knee(points_of(count, NAMES), dict.fromkeys(NAMES[:count], True), decision(NAMES[:count]), str(path))
    with Image.open(path) as image:
        assert image.size == (1200, 800)
    assert [file.name for file in path.parent.iterdir()] == ["knee.png"]
    knee, onset = pixels_near(path, GREEN), pixels_near(path, ORANGE)
    assert len(knee)
    assert knee.min() < onset.min()


def test_without_a_knee_nothing_is_marked(tmp_path):
    path = tmp_path / "rise.png"
    plot_knee(points_of(2, NAMES), dict.fromkeys(NAMES[:2], True), decision(NAMES[:2], "improving"), str(path))
    assert len(pixels_near(path, GREEN)) == len(pixels_near(path, ORANGE)) == 0


def test_values_that_are_missing_infinite_or_far_off_are_drawn(tmp_path):
    plain, odd = tmp_path / "plain.png", tmp_path / "odd.png"
    points = points_of(2, NAMES)
    orientations = dict.fromkeys(NAMES[:2], False)
    plot_knee(points, orientations, decision(NAMES[:2], "diverging"), str(plain))
    points[0] = (0, {"psnr_y": -1e6})
    points[7] = (700, {})
    points[-1] = (points[-1][0], {"psnr_y": math.nan, "lpips": math.inf})
    plot_knee(points, orientations, decision(NAMES[:2], "diverging"), str(odd))

    def count(path):
        with Image.open(path) as image:
            return int((np.abs(np.asarray(image.convert("RGB")).astype(int) - VERMILION).max(axis=2) <= 6).sum())

    assert count(plain) == 0
    assert count(odd) > 20
    everything_lost = [(step, dict.fromkeys(orientations, math.nan)) for step, _ in points]
    plot_knee(everything_lost, orientations, decision(NAMES[:2], "diverging"), str(odd))
    assert count(odd) > 20
