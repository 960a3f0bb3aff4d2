"""Primitives of the charts: scales, ticks, and inline SVG that takes its colours from the page's style sheet."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, log10

import numpy as np

from linearsr_platform.report.markup import MINUS, Markup, compact, element


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear map from data to pixels; `reverse` is expressed by a descending pixel range."""

    low: float
    high: float
    start_px: float
    end_px: float

    def __call__(self, value: float) -> float:
        """Return the pixel position of a value."""
        return self.start_px + (value - self.low) / (self.high - self.low) * (self.end_px - self.start_px)

    def holds(self, value: float) -> bool:
        """Return whether a value lies inside the domain."""
        return self.low <= value <= self.high


def padded(values: Iterable[float], *, share: float = 0.08) -> tuple[float, float]:
    """Return the range of values, widened by `share` of itself at both ends and never empty."""
    finite = list(values)
    low, high = min(finite), max(finite)
    margin = (high - low) * share or max(abs(high), 1.0) * 0.01
    return low - margin, high + margin


HANDFUL = 8
"""Evaluations below which none is taken for an outlier."""


def without_outliers(values: Sequence[float]) -> tuple[float, float]:
    """Return the range that shows a plateau: far outliers, such as the first points of a curve, do not stretch it.

    Of a handful of evaluations one or another lies several interquartile ranges away by noise alone, and all are shown.
    """
    first, third = np.percentile(values, [25, 75])
    reach = 8.0 * (third - first) if len(values) >= HANDFUL else np.inf
    inside = [value for value in values if first - reach <= value <= third + reach]
    return min(inside), max(inside)


def ticks(low: float, high: float, *, at_most: int) -> tuple[float, ...]:
    """Return round values inside [low, high], `at_most` of them, at the finest step of 1, 2 or 5 times a power of ten."""
    power = floor(log10((high - low) / at_most))
    for exponent in (power, power + 1, power + 2):
        for factor in (1, 2, 5):
            step = factor * 10.0**exponent
            first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
            if 0 <= last - first < at_most:
                return tuple(round(index * step, 12) for index in range(first, last + 1))
    return ()


def tick_labels(values: Sequence[float]) -> list[str]:
    """Write tick values with the decimals that their spacing needs."""
    step = min((b - a for a, b in pairwise(values)), default=1.0)
    decimals = max(0, -floor(log10(step) + 1e-9))
    return [f"{value:.{decimals}f}".replace("-", MINUS) for value in values]


def svg(width_px: float, height_px: float, *children: str, label: str, class_: str = "chart") -> Markup:
    """Return a picture with a text alternative; it scales with its container."""
    return element(
        "svg",
        element("title", label),
        *children,
        viewBox=f"0 0 {compact(width_px)} {compact(height_px)}",
        role="img",
        aria_label=label,
        class_=class_,
    )


def window(x_px: float, y_px: float, width_px: float, height_px: float, *children: str) -> Markup:
    """Return a frame that cuts off what its children draw outside it; children use the outer coordinates."""
    box = " ".join(compact(value) for value in (x_px, y_px, width_px, height_px))
    return element("svg", *children, x=x_px, y=y_px, width=width_px, height=height_px, viewBox=box, overflow="hidden")


def text(x_px: float, y_px: float, content: str, *, class_: str = "tick", anchor: str | None = None) -> Markup:
    """Return a line of text whose baseline is at `y_px`; `anchor` is SVG's start, middle or end."""
    return element("text", content, x=x_px, y=y_px, class_=class_, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, *, class_: str) -> Markup:
    """Return a straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def path(points: Sequence[tuple[float, float]], *, class_: str) -> Markup:
    """Return a line through points in pixels."""
    return element("path", d="M" + "L".join(f"{compact(x)} {compact(y)}" for x, y in points), class_=class_)


def dot(x_px: float, y_px: float, radius_px: float, *, class_: str, tip: str | None = None) -> Markup:
    """Return a circle, with a text that shows while the pointer rests on it."""
    circle = element("circle", cx=x_px, cy=y_px, r=radius_px, class_=class_)
    return element("g", element("title", tip), circle) if tip else circle


def rectangle(x_px: float, y_px: float, width_px: float, height_px: float, *, class_: str, radius_px: float = 0) -> Markup:
    """Return a filled rectangle."""
    return element("rect", x=x_px, y=y_px, width=max(width_px, 0.0), height=max(height_px, 0.0), rx=radius_px or None, class_=class_)


def y_axis(scale: Scale, left_px: float, right_px: float, *, at_most: int) -> list[Markup]:
    """Return horizontal grid lines with their values at the left."""
    values = ticks(*sorted((scale.low, scale.high)), at_most=at_most)
    drawn: list[Markup] = []
    for value, label in zip(values, tick_labels(values), strict=True):
        drawn.append(line(left_px, scale(value), right_px, scale(value), class_="grid"))
        drawn.append(text(left_px - 6, scale(value) + 3.5, label, anchor="end"))
    return drawn


def x_axis(scale: Scale, bottom_px: float, values: Sequence[float], labels: Sequence[str]) -> list[Markup]:
    """Return the bottom line with ticks and their labels under it."""
    drawn = [line(scale.start_px, bottom_px, scale.end_px, bottom_px, class_="axis")]
    for value, label in zip(values, labels, strict=True):
        drawn.append(line(scale(value), bottom_px, scale(value), bottom_px + 4, class_="axis"))
        drawn.append(text(scale(value), bottom_px + 15, label, anchor="middle"))
    return drawn
