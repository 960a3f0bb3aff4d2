"""The charts of the report: validation curves with their knee, steps against a metric, and the perception-distortion plane."""

import re
from collections.abc import Sequence
from math import log2

from linearsr_platform.report.markup import ARROWS, Markup, metric_label, number
from linearsr_platform.report.model import EvaluationRow, SweepPoint, TrainerCurve, measured, orientation
from linearsr_platform.report.svg import (
    Scale,
    dot,
    line,
    padded,
    path,
    rectangle,
    svg,
    text,
    tick_labels,
    ticks,
    window,
    without_outliers,
    x_axis,
    y_axis,
)

WIDTH, HEIGHT = 360.0, 262.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 346.0, 16.0, 222.0
"""Size and frame of the step charts, px."""
EXPERT_COLOURS = 6
"""Colours the style sheet has for experts; more experts repeat them."""


def expert_class(index: int) -> str:
    """Return the style class of an expert's colour; index 0 is the noisiest."""
    return f"e{index % EXPERT_COLOURS + 1}"


def trainer_class(name: str) -> str:
    """Return the style class of a trainer: its expert's colour, or ink for a trainer of no single expert."""
    match = re.search(r"expert-(\d+)$", name)
    return expert_class(int(match.group(1)) - 1) if match else "whole"


def arrow(metric: str) -> str:
    """Return an arrow that says which way is better, or nothing if that is not known."""
    better = orientation(metric)
    return "" if better is None else f" {ARROWS[better]}"


def curve_panel(curve: TrainerCurve, metric: str, *, last_step: float) -> Markup:
    """Draw one metric of one trainer against steps; what came after the knee, and is not used, is faint.

    Args:
        last_step: right end of the axis, shared by the trainers of a stage so that their knees line up.
    """
    width, height, left, right, top, bottom = 216.0, 122.0, 38.0, 208.0, 22.0, 102.0
    points = curve.points(metric)
    low, high = padded(without_outliers([value for _, value in points]), share=0.12)
    x, y = Scale(0.0, last_step, left, right), Scale(low, high, bottom, top)
    colour = trainer_class(curve.name)
    x_values = ticks(0.0, last_step, at_most=4)
    drawn = [
        text(0, 11, f"{metric_label(metric)}{arrow(metric)}", class_="name"),
        *y_axis(y, left, right, at_most=4),
        *x_axis(x, bottom, x_values, tick_labels(x_values)),
        window(left, top, right - left, bottom - top, *_curve(curve, points, x, y, colour)),
    ]
    knee = next(((step, value) for step, value in points if step == curve.knee_step), None)
    if knee is not None and y.holds(knee[1]):
        drawn.append(dot(x(knee[0]), y(knee[1]), 4.5, class_=f"knee-dot {colour}", tip=f"step {knee[0]:g}: {number(knee[1])}"))
        drawn.append(text(right, 11, number(knee[1]), class_="value", anchor="end"))
    return svg(width, height, *drawn, label=_curve_label(curve, metric, points))


def _curve(curve: TrainerCurve, points: Sequence[tuple[float, float]], x: Scale, y: Scale, colour: str) -> list[Markup]:
    drawn = []
    knee = curve.knee_step
    if knee is not None:
        drawn.append(line(x(knee), y.end_px, x(knee), y.start_px, class_=f"knee-line {colour}"))
    if curve.confirmed_at is not None:
        drawn.append(line(x(curve.confirmed_at), y.end_px, x(curve.confirmed_at), y.start_px, class_="confirmed"))
    placed = [(x(step), y(value)) for step, value in points]
    split = next((index for index, (step, _) in enumerate(points) if knee is not None and step >= knee), len(points) - 1)
    drawn.append(path(placed[split:], class_=f"curve after {colour}"))
    drawn.append(path(placed[: split + 1], class_=f"curve {colour}"))
    return drawn


def _curve_label(curve: TrainerCurve, metric: str, points: Sequence[tuple[float, float]]) -> str:
    first, last = points[0], points[-1]
    at_knee = next((f", {number(value)} at the knee, step {step:g}" for step, value in points if step == curve.knee_step), "")
    return (
        f"{metric_label(metric)} of {curve.stage} {curve.name}: {number(first[1])} at step {first[0]:g}{at_knee}, "
        f"{number(last[1])} at step {last[0]:g}"
    )


def sweep_panel(sweep: Sequence[SweepPoint], metric: str, baseline: float | None) -> Markup:
    """Draw one metric, measured at every point, against sampler steps, with bicubic as a line and the better side of it tinted."""
    points = [(point.steps, point.values[metric]) for point in sweep]
    counts = [steps for steps, _ in points]
    y = Scale(*padded([value for _, value in points] + ([] if baseline is None else [baseline]), share=0.18), BOTTOM, TOP)
    x = Scale(log2(min(counts)) - 0.25, log2(max(counts)) + 0.25, LEFT, RIGHT)
    drawn = [] if baseline is None else _better_side(metric, baseline, y)
    drawn += y_axis(y, LEFT, RIGHT, at_most=5)
    drawn += x_axis(x, BOTTOM, [log2(steps) for steps in counts], [f"{steps}" for steps in counts])
    drawn.append(text((LEFT + RIGHT) / 2, BOTTOM + 34, "sampler steps", class_="axis-name", anchor="middle"))
    if baseline is not None:
        drawn.append(line(LEFT, y(baseline), RIGHT, y(baseline), class_="baseline"))
        drawn.append(text(RIGHT - 4, y(baseline) - 5, f"bicubic {number(baseline)}", class_="baseline-name", anchor="end"))
    drawn.append(path([(x(log2(steps)), y(value)) for steps, value in points], class_="curve routed"))
    for steps, value in points:
        drawn.append(dot(x(log2(steps)), y(value), 4, class_="point routed", tip=f"{steps} steps: {number(value)}"))
        drawn.append(text(x(log2(steps)), y(value) - 9, number(value), class_="value", anchor="middle"))
    spoken = ", ".join(f"{number(value)} at {steps}" for steps, value in points)
    bicubic = "" if baseline is None else f"; bicubic {number(baseline)}"
    return svg(WIDTH, HEIGHT, *drawn, label=f"{metric_label(metric)} against sampler steps: {spoken}{bicubic}")


def _better_side(metric: str, baseline: float, y: Scale) -> list[Markup]:
    better = orientation(metric)
    if better is None:
        return []
    top, bottom = sorted((y(baseline), TOP if better else BOTTOM))
    return [rectangle(LEFT, top, RIGHT - LEFT, bottom - top, class_="better")]


def plane(sweep: Sequence[SweepPoint], rows: Sequence[EvaluationRow], distortion: str, perceptual: str) -> Markup:
    """Draw perception against distortion, better to the right and upwards: a dot for each step count, and the estimates that have none."""
    path_points = [(point.steps, (point.values[distortion], point.values[perceptual])) for point in sweep]
    shown = {"routed", "one_step"} if any(point.steps == 1 for point in sweep) else {"routed"}
    others = [(row, at) for row in rows if row.kind not in shown and (at := _place(row.values, distortion, perceptual)) is not None]
    places = [at for _, at in path_points] + [at for _, at in others]
    x = _oriented(distortion, [at[0] for at in places], LEFT, RIGHT)
    y = _oriented(perceptual, [at[1] for at in places], BOTTOM, TOP)
    x_values = ticks(*sorted((x.low, x.high)), at_most=5)
    bicubic = next((at for row, at in others if row.kind == "bicubic"), None)
    drawn = [] if bicubic is None else _quadrant(x(bicubic[0]), y(bicubic[1]))
    drawn += y_axis(y, LEFT, RIGHT, at_most=5)
    drawn += x_axis(x, BOTTOM, x_values, tick_labels(x_values))
    name = f"{metric_label(distortion)}, better to the right"
    drawn.append(text((LEFT + RIGHT) / 2, BOTTOM + 34, name, class_="axis-name", anchor="middle"))
    drawn.append(path([(x(a), y(b)) for _, (a, b) in path_points], class_="curve routed"))
    for steps, (a, b) in path_points:
        drawn.append(dot(x(a), y(b), 4, class_="point routed", tip=f"{steps} steps: {number(a)}, {number(b)}"))
        drawn.append(text(x(a), y(b) - 9, f"{steps}", class_="value", anchor="middle"))
    for row, (a, b) in others:
        inwards = -9 if x(a) > (LEFT + RIGHT) / 2 else 9
        drawn.append(dot(x(a), y(b), 5, class_=f"point {row.kind}", tip=f"{row.label}: {number(a)}, {number(b)}"))
        drawn.append(text(x(a) + inwards, y(b) + 14, row.label, class_=f"point-name {row.kind}", anchor="end" if inwards < 0 else None))
    spoken = "; ".join(f"{steps} steps {number(a)} and {number(b)}" for steps, (a, b) in path_points)
    return svg(WIDTH, HEIGHT, *drawn, label=f"{metric_label(distortion)} and {metric_label(perceptual)} together: {spoken}")


def _place(values: dict[str, float], distortion: str, perceptual: str) -> tuple[float, float] | None:
    a, b = measured(values, distortion), measured(values, perceptual)
    return None if a is None or b is None else (a, b)


def _quadrant(x_px: float, y_px: float) -> list[Markup]:
    return [
        rectangle(x_px, TOP, RIGHT - x_px, y_px - TOP, class_="better"),
        line(x_px, TOP, x_px, BOTTOM, class_="baseline"),
        line(LEFT, y_px, RIGHT, y_px, class_="baseline"),
    ]


def _oriented(metric: str, values: Sequence[float], worse_px: float, better_px: float) -> Scale:
    low, high = padded(values, share=0.18)
    return Scale(high, low, worse_px, better_px) if orientation(metric) is False else Scale(low, high, worse_px, better_px)
