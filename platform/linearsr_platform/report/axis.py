"""The picture of the noise axis: which expert owns which log-SNR, and where the sampler calls it."""

from collections.abc import Sequence
from itertools import pairwise

from linearsr.experts import intervals, log_snr, route, training_interval
from linearsr_platform.report.charts import expert_class
from linearsr_platform.report.markup import MINUS, Markup
from linearsr_platform.report.svg import Scale, dot, line, rectangle, svg, text

LOG_SNR_SHOWN = (-9.5, 10.5)
"""Ends of the axis; beyond them t is within 0.01 of pure noise or of the clean image."""
NOISE_LEVELS = (0.99, 0.97, 0.9, 0.75, 0.5, 0.25, 0.1, 0.03, 0.01)
WIDTH, HEIGHT, LEFT, RIGHT = 1120.0, 240.0, 26.0, 1116.0
BAND_TOP, BAND_HEIGHT = 64.0, 70.0


def noise_axis(boundaries: Sequence[float], overlap_log_snr: float, times: Sequence[float]) -> Markup:
    """Draw the experts as bands over log-SNR, noise at the left, with t above, the boundaries in both, and the sampler's steps.

    Args:
        boundaries: ascending noise levels.
        overlap_log_snr: how far past its inner edges an expert also trains; drawn as a thin bar under its band.
        times: noise levels the sampler evaluates, descending.
    """
    x = Scale(*LOG_SNR_SHOWN, LEFT, RIGHT)
    bands = [_band(index, boundaries, overlap_log_snr, x) for index in range(len(boundaries) + 1)]
    drawn = [markup for band in bands for markup in band]
    drawn += [markup for boundary in boundaries for markup in _boundary(boundary, x)]
    drawn += _axes(x)
    drawn += _steps(times, boundaries, x)
    spoken = "; ".join(f"expert-{index + 1} owns t {low:.3f} to {high:.3f}" for index, (low, high) in enumerate(intervals(boundaries)))
    return svg(WIDTH, HEIGHT, *drawn, label=f"Experts on the log-SNR axis, noisiest first: {spoken}", class_="chart wide")


def _clamped(t: float, x: Scale) -> float:
    return x(min(max(log_snr(t), x.low), x.high))


def _band(index: int, boundaries: Sequence[float], overlap_log_snr: float, x: Scale) -> list[Markup]:
    low, high = intervals(boundaries)[index]
    left, right = _clamped(high, x), _clamped(low, x)
    trained_low, trained_high = training_interval(index, boundaries, overlap_log_snr)
    trained_left, trained_right = _clamped(trained_high, x), _clamped(trained_low, x)
    colour = expert_class(index)
    trained_y = BAND_TOP + BAND_HEIGHT + 5 + 5 * (index % 2)
    name = f"expert-{index + 1}" if right - left > 66 else f"{index + 1}"
    return [
        rectangle(left, BAND_TOP, right - left, BAND_HEIGHT, class_=f"band {colour}"),
        text((left + right) / 2, BAND_TOP + 26, name, class_="band-name", anchor="middle"),
        text((left + right) / 2, BAND_TOP + 43, _range(low, high), class_="band-range", anchor="middle")
        if right - left > 90
        else Markup(""),
        rectangle(trained_left, trained_y, trained_right - trained_left, 3, class_=f"fill {colour}", radius_px=1.5),
    ]


def _range(low: float, high: float) -> str:
    return f"t {low:.3g} to {high:.3g}"


def _boundary(boundary: float, x: Scale) -> list[Markup]:
    at = _clamped(boundary, x)
    label = f"{log_snr(boundary):.2f}".replace("-", MINUS)
    return [
        line(at, BAND_TOP - 26, at, BAND_TOP + BAND_HEIGHT + 18, class_="boundary"),
        text(at, BAND_TOP - 44, f"t = {boundary:.3f}", class_="boundary-name", anchor="middle"),
        text(at, BAND_TOP - 31, f"\u03bb = {label}", class_="tick", anchor="middle"),
    ]


def _axes(x: Scale) -> list[Markup]:
    bottom = BAND_TOP + BAND_HEIGHT + 56
    drawn = [line(LEFT, bottom, RIGHT, bottom, class_="axis")]
    for value in range(-8, 11, 2):
        drawn.append(line(x(value), bottom, x(value), bottom - 4, class_="axis"))
        drawn.append(text(x(value), bottom - 8, f"{value}".replace("-", MINUS), anchor="middle"))
    for t in NOISE_LEVELS:
        drawn.append(line(_clamped(t, x), bottom, _clamped(t, x), bottom + 4, class_="axis"))
        drawn.append(text(_clamped(t, x), bottom + 16, f"{t:g}", anchor="middle"))
    drawn.append(text(2, bottom - 8, "\u03bb", class_="axis-name"))
    drawn.append(text(3, bottom + 16, "t", class_="axis-name"))
    drawn.append(text(LEFT, bottom + 38, "\u2190 pure noise", class_="axis-name"))
    drawn.append(text(RIGHT, bottom + 38, "clean image \u2192", class_="axis-name", anchor="end"))
    return drawn


def _steps(times: Sequence[float], boundaries: Sequence[float], x: Scale) -> list[Markup]:
    y = BAND_TOP + BAND_HEIGHT - 12
    places = [max(_clamped(t, x), LEFT + 8) for t in times]
    drawn = [line(a, y, b, y, class_="visit-path") for a, b in pairwise(places)]
    for index, (t, at) in enumerate(zip(times, places, strict=True)):
        tip = f"step {index + 1}: t = {t:.3f}, expert-{route(t, boundaries) + 1}"
        drawn.append(dot(at, y, 3.2, class_="visit", tip=tip))
    return drawn
