"""The picture of a knee: every metric's curve, where it was best, and where training should have stopped."""

from collections.abc import Mapping, Sequence
from math import ceil, sqrt
from textwrap import wrap
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from linearsr.knee import KneeDecision
from linearsr_platform import storage
from linearsr_platform.report.svg import padded

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Points = Sequence[tuple[int, Mapping[str, float]]]

WIDTH_PX, HEIGHT_PX, DPI = 1200, 800, 100
ROW_PX = 130
"""Least height of a row of panels; more rows than fit make the picture taller."""

# Okabe and Ito's palette, told apart with every kind of colour vision; line styles differ as well.
_CURVE, _KNEE, _ONSET, _CERTAIN, _DIVERGED = "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#D55E00"
_OWN = "onset of this metric alone"
_REACH = 6.0  # Widths of the smoothing from which on a neighbour adds nothing.
_INK, _FAINT = "#222222", "#8a8a8a"
_LEFT_PX, _RIGHT_PX, _BOTTOM_PX, _GAP_PX = 74, 40, 128, 44


def plot_knee(points: Points, orientations: Mapping[str, bool], decision: KneeDecision, path: str) -> None:
    """Draw the curves of all metrics with the knee, and write them as a PNG of 1200 x 800 pixels, taller from 10 metrics on.

    Values that lie far outside the rest are shown as triangles at the edge, those that are not finite as crosses at the bottom.

    Args:
        points: (step, values) in ascending order of steps, at least one; metrics may be missing.
        orientations: metrics to draw, and whether a higher value is better.
        decision: what the knee detector said about them.
        path: file or URL to write, whole or not at all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = _figure(points, orientations, decision)
    with storage.atomic_file(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))  # type: ignore[no-untyped-call]


def _figure(points: Points, orientations: Mapping[str, bool], decision: KneeDecision) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.gridspec import GridSpec
    from matplotlib.ticker import MaxNLocator

    count = len(orientations)
    columns = 1 if count <= 3 else 2 if count <= 6 else 3
    rows = ceil(count / columns)
    reason = wrap(decision.reason, 155)[:3]
    top_px = 74 + 18 * len(reason)
    height_px = max(HEIGHT_PX, top_px + _BOTTOM_PX + rows * (ROW_PX + _GAP_PX))
    figure = Figure(figsize=(WIDTH_PX / DPI, height_px / DPI), dpi=DPI, facecolor="white")
    left = (_LEFT_PX - 50) / WIDTH_PX
    figure.text(left, 1 - 16 / height_px, _title(decision, points[-1][0]), size=16, weight="bold", color=_INK, va="top")
    figure.text(left, 1 - 44 / height_px, "\n".join(reason), size=10, color=_INK, va="top", parse_math=False)
    panel_px = (height_px - top_px - _BOTTOM_PX - (rows - 1) * _GAP_PX) / rows
    grid = GridSpec(
        rows,
        columns,
        left=_LEFT_PX / WIDTH_PX,
        right=1 - _RIGHT_PX / WIDTH_PX,
        top=1 - top_px / height_px,
        bottom=_BOTTOM_PX / height_px,
        hspace=_GAP_PX / panel_px,
        wspace=0.16 if columns < 3 else 0.22,
    )
    first: Axes | None = None
    legend: dict[str, Artist] = {}
    for index, (name, higher) in enumerate(orientations.items()):
        axes = figure.add_subplot(grid[index // columns, index % columns], sharex=first)
        first = first or axes
        legend |= _panel(axes, points, name, decision, higher=higher)
        axes.tick_params(labelbottom=index + columns >= count)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=9 // columns + 1, integer=True))
    order = [label for label in _legend_order(decision) if label in legend]
    handles = [legend[label] for label in order]
    figure.legend(handles, order, loc="lower center", ncols=4, frameon=False, fontsize=10, handlelength=2.6, columnspacing=2)
    figure.text(0.5, (_BOTTOM_PX - 36) / height_px, "step", size=10, color=_INK, ha="center", va="center")
    return figure


def _panel(axes: "Axes", points: Points, name: str, decision: KneeDecision, *, higher: bool) -> "dict[str, Artist]":
    """Draw one metric; returns what the legend may name."""
    steps = np.array([step for step, values in points if name in values], dtype=float)
    values = np.array([values[name] for _, values in points if name in values], dtype=float)
    finite = np.isfinite(values)
    shown = _range(values[finite])
    axes.set_ylim(*shown)
    axes.set_xlim(*padded([points[0][0], points[-1][0]], share=0.015))
    drawn = _marks(axes, decision, name, last_step=points[-1][0])
    steps_known, known = steps[finite], values[finite]
    inside = (known >= shown[0]) & (known <= shown[1])
    steps_shown, shown_values = steps_known[inside], known[inside]
    size = max(8.0, min(36.0, 2400 / len(points)))
    drawn["evaluation"] = axes.scatter(steps_shown, shown_values, s=size, color=_FAINT, alpha=0.75, linewidths=0, zorder=2)
    if len(shown_values):
        smooth = _smoothed(shown_values)
        (drawn["smoothed"],) = axes.plot(steps_shown, smooth, color=_CURVE, linewidth=2, zorder=3)
        best = np.flatnonzero(steps_shown == _number(decision.metrics[name].best_step if name in decision.metrics else None))
        if len(best):
            drawn["best smoothed"] = axes.scatter(
                steps_shown[best], smooth[best], s=70, facecolors="white", edgecolors=_CURVE, linewidths=2, zorder=4
            )
    for beyond, edge, marker in ((known < shown[0], 0.035, "v"), (known > shown[1], 0.965, "^")):
        if beyond.any():
            drawn["outside the panel"] = _at_edge(axes, steps_known[beyond], edge, marker, _FAINT)
    if not finite.all():
        drawn["not finite"] = _at_edge(axes, steps[~finite], 0.07, "x", _DIVERGED)
    _decorate(axes, name, higher=higher)
    return drawn


def _marks(axes: "Axes", decision: KneeDecision, name: str, *, last_step: int) -> "dict[str, Artist]":
    """Draw what the detector said: the knee with its interval, the onset, when it was certain, and this metric's own onset."""
    drawn: dict[str, Artist] = {}
    labels = _mark_labels(decision)
    own = decision.metrics[name].onset_step if name in decision.metrics else None
    if decision.onset_step is not None and decision.onset_step < last_step:
        drawn["after the onset"] = axes.axvspan(decision.onset_step, last_step, facecolor=_ONSET, alpha=0.13, linewidth=0, zorder=0)
    if own is not None:
        drawn[_OWN] = _at_edge(axes, np.array([float(own)]), 0.035, "^", _ONSET)
    if decision.interval is not None:
        drawn[labels["interval"]] = axes.axvspan(*decision.interval, facecolor=_KNEE, alpha=0.22, linewidth=0, zorder=0.5)
    lines = (
        ("certain", decision.confirmed_at, _CERTAIN, (0, (1, 1.5))),
        ("knee", decision.knee_step, _KNEE, "-"),
        ("onset", decision.onset_step, _ONSET, (0, (5, 2.5))),
    )
    for key, step, color, style in lines:
        if step is not None:
            drawn[labels[key]] = axes.axvline(step, color=color, linewidth=2.4, linestyle=style, zorder=2.5)
    return drawn


def _title(decision: KneeDecision, last_step: int) -> str:
    """Return the verdict in one line."""
    knee, certain = _number(decision.knee_step), _number(decision.confirmed_at)
    if decision.state == "diverging":
        back = "" if decision.knee_step is None else f": go back to step {knee:,}"
        return f"Diverging at step {last_step if decision.confirmed_at is None else certain:,}{back}"
    if decision.knee_step is None:
        return f"No knee yet: still improving at step {last_step:,}"
    if decision.confirmed_at is None:
        return f"On a plateau, nothing has got worse yet: the candidate is step {knee:,}"
    return f"Knee at step {knee:,}, certain at step {certain:,}"


def _mark_labels(decision: KneeDecision) -> dict[str, str]:
    """Return how the legend names each mark."""
    low, high = decision.interval or (0, 0)
    return {
        "knee": f"{'knee' if decision.confirmed_at is not None else 'candidate'}: step {_number(decision.knee_step):,}",
        "interval": f"90 % interval: {low:,} to {high:,}",
        "onset": f"onset: step {_number(decision.onset_step):,}",
        "certain": f"certain at step {_number(decision.confirmed_at):,}",
    }


def _legend_order(decision: KneeDecision) -> list[str]:
    """Return labels of the legend; matplotlib fills it column by column."""
    marks = _mark_labels(decision)
    curve = ["evaluation", "smoothed", "best smoothed"]
    return [
        *curve,
        marks["knee"],
        marks["interval"],
        marks["onset"],
        marks["certain"],
        "after the onset",
        _OWN,
        "outside the panel",
        "not finite",
    ]


def _decorate(axes: "Axes", name: str, *, higher: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter

    axes.set_title(name, loc="left", size=12, weight="bold", color=_INK, parse_math=False)
    axes.set_title("\u2191 higher is better" if higher else "\u2193 lower is better", loc="right", size=10, color=_INK)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8, zorder=-1)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    axes.tick_params(labelsize=10, colors=_INK)


def _at_edge(axes: "Axes", steps: Array, height: float, marker: str, color: str) -> "Artist":
    """Draw marks at a height that is a share of the panel, whatever its values are."""
    heights = np.full(len(steps), height)
    return axes.scatter(steps, heights, s=45, marker=marker, color=color, transform=axes.get_xaxis_transform(), zorder=4)


def _range(values: Array) -> tuple[float, float]:
    """Return the values to show: a rise is shown from its beginning, a first value far outside the rest is not."""
    if not len(values):
        return 0.0, 1.0
    low, high = np.quantile(values, (0.05, 0.95))
    reach = 1.5 * (high - low)
    inside = values[(values >= low - reach) & (values <= high + reach)]
    return padded((inside if reach > 0 else values).tolist())


def _smoothed(values: Array) -> Array:
    """Fit a line to the neighbours of each value, with a width that grows with the number of evaluations from 1 to 3 of them."""
    width = max(1.0, min(3.0, sqrt(len(values)) / 5))
    reach = ceil(_REACH * width)
    distance = np.arange(reach, -reach - 1, -1)
    neighbours = np.arange(len(values))[:, None] - distance
    weights = np.exp(-0.5 * (distance / width) ** 2) * ((neighbours >= 0) & (neighbours < len(values)))
    first, second = (weights * distance).sum(axis=1), (weights * distance**2).sum(axis=1)
    # A line and not a mean: at the ends a mean would flatten the rise.
    kernel = weights * (second[:, None] - distance * first[:, None])
    total = kernel.sum(axis=1)
    near = sliding_window_view(np.pad(values, reach), len(distance))
    return np.asarray(np.divide((kernel * near).sum(axis=1), total, out=values.copy(), where=total > 0))


def _number(step: int | None) -> int:
    """Return a step for a text that is only shown where there is one."""
    return -1 if step is None else step
