"""The two pictures of a boundary search: every trial on the noise axis, and what the trained network's gradients say about that axis."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from linearsr.experts import bisect_boundaries, log_snr, noise_level
from linearsr.noise_profile import NoiseProfile
from linearsr.partition import Proposal
from linearsr_platform import storage
from linearsr_platform.report.axis import LOG_SNR_SHOWN, NOISE_LEVELS
from linearsr_platform.report.markup import metric_label
from linearsr_platform.report.search_model import SearchReport, TrialRow, ranked, score_text
from linearsr_platform.report.svg import padded, without_outliers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

DPI = 100
WIDTH_PX = 1200

# Okabe and Ito's palette and two maps of matplotlib's that are told apart with every kind of colour vision.
_BLUE, _GREEN, _VERMILION, _PINK = "#0072B2", "#009E73", "#D55E00", "#CC79A7"
_SCORES, _COSINES = "cividis", "RdBu"
_INK, _SOFT, _FAINT, _EMPTY = "#222222", "#5d626b", "#8a8a8a", "#e9e9e9"
_LEFT_PX, _RIGHT_PX, _TOP_PX, _BOTTOM_PX = 232, 318, 132, 142
_CUT_STYLES: tuple[tuple[str, str, Literal["solid", "dotted"]], ...] = (
    ("least-conflict", _VERMILION, "solid"),
    ("bisection", _INK, "dotted"),
)
"""Proposal -> colour and line."""
_HEIGHT = {"done": 0.78, "running": 0.5, "stopped": 0.34, "failed": 0.78, "queued": 0.78}
"""Share of its row that a trial's bars fill."""


def plot_axis(report: SearchReport, path: str) -> None:
    """Draw the boundaries of every trial on the noise axis, best first, coloured by score, and write a PNG 1200 pixels wide.

    Args:
        report: the search; a score far outside the rest takes the colour at the end of the bar.
        path: file or URL to write, whole or not at all.
    """
    trials = ranked(report.trials, report.higher_is_better)
    row_px = 26 if len(trials) <= 24 else 20 if len(trials) <= 40 else 15
    height_px = _TOP_PX + _BOTTOM_PX + max(1, len(trials)) * row_px
    figure, axes = _axis_figure(height_px)
    _title(figure, report, height_px)
    colours = _colours(trials)
    for row, trial in enumerate(trials):
        _trial(axes, row, trial, colours, best=report.best is not None and trial.name == report.best.name, size=10 if row_px > 15 else 8)
    _columns(axes, -0.5, ("trial", "from", "score", "steps", "state"), raised_px=17, size=9, color=_SOFT)
    for boundary in bisect_boundaries():
        axes.axvline(log_snr(boundary), color=_PINK, linewidth=1.4, linestyle=(0, (4, 3)), zorder=2.5)
    axes.set_ylim(max(1, len(trials)) - 0.5, -0.5)
    if not trials:
        axes.text(0.5, 0.5, "no trial yet", transform=axes.transAxes, ha="center", va="center", color=_SOFT)
    _axis_legend(figure, report, colours, height_px)
    _write(figure, path)


def plot_profile(profile: NoiseProfile, proposals: Sequence[Proposal], path: str) -> None:
    """Draw loss, gradient norm and the cosine of gradients over log-SNR, with the least-conflict cuts, as a PNG of 1200 x 760 pixels.

    Args:
        profile: of a trained network; bands are 95 % intervals.
        proposals: the first named `least-conflict` and the first named `bisection` are drawn.
        path: file or URL to write, whole or not at all.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_PX / DPI, 7.6), dpi=DPI, facecolor="white")
    figure.text(0.022, 0.975, "What the trained network says about the noise axis", size=15, weight="bold", color=_INK, va="top")
    told = ", ".join(f"{key} {value}" for key, value in profile.source.items())
    subtitle = f"{len(profile.loss)} levels, {profile.samples} gradients each" + (f"; {told}" if told else "")
    figure.text(0.022, 0.928, _shortened(subtitle, 165), size=10, color=_SOFT, va="top", parse_math=False)
    edges = np.array(profile.edges)
    centres = (edges[1:] + edges[:-1]) / 2
    places = ((0.062, 0.555, 0.39, 0.265), (0.062, 0.125, 0.39, 0.265), (0.51, 0.125, 0.392, 0.695))
    loss, norm, heat = (figure.add_axes(place) for place in places)
    _band(loss, centres, profile.loss, profile.loss_error, _BLUE)
    _band(norm, centres, profile.gradient_norm, profile.gradient_norm_error, _GREEN, logarithmic=True)
    _mass(loss, edges, profile.mass)
    _mass(norm, edges, profile.mass)
    _heat_map(figure, heat, profile)
    # The first of each name: with several numbers of experts every name comes once for each.
    cuts = {proposal.name: [log_snr(t) for t in proposal.boundaries] for proposal in reversed(proposals)}
    error = float(np.median(np.array(profile.affinity_error)[~np.eye(len(centres), dtype=bool)])) if len(centres) > 1 else 0.0
    similarity = f"Cosine of mean gradients (typical error \u00b1{error:.2g})"
    for axes, title in ((loss, "Loss"), (norm, "Norm of the mean gradient"), (heat, similarity)):
        _noise_scale(axes, edges, title)
        if axes is not heat:
            _cuts(axes, cuts, edges)
    _blocks(heat, cuts.get("least-conflict"), edges)
    _profile_legend(figure, cuts)
    _write(figure, path)


def _write(figure: "Figure", path: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with storage.atomic_file(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))  # type: ignore[no-untyped-call]


def _axis_figure(height_px: int) -> "tuple[Figure, Axes]":
    """Return a figure with the noise axis: log-SNR below, t above."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_PX / DPI, height_px / DPI), dpi=DPI, facecolor="white")
    place = (_LEFT_PX / WIDTH_PX, _BOTTOM_PX / height_px)
    size = (1 - (_LEFT_PX + _RIGHT_PX) / WIDTH_PX, 1 - (_TOP_PX + _BOTTOM_PX) / height_px)
    axes = figure.add_axes((*place, *size))
    axes.set_xlim(*LOG_SNR_SHOWN)
    axes.set_yticks([])
    axes.set_xticks(range(-8, 11, 2))
    axes.set_xlabel("log-SNR \u03bb        pure noise \u2190   \u2192 clean image", size=10, color=_INK)
    top = axes.secondary_xaxis("top")
    top.set_xticks([log_snr(t) for t in NOISE_LEVELS], [f"{t:g}" for t in NOISE_LEVELS])
    top.set_xlabel("noise level t", size=10, color=_INK)
    for each in (axes, top):
        each.tick_params(labelsize=9, colors=_INK)
    for side in ("left", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _title(figure: "Figure", report: SearchReport, height_px: int) -> None:
    count = len(report.trials)
    left = 24 / WIDTH_PX
    title = f"{_shortened(report.name, 60)}: boundaries of {count} trial{'s' if count != 1 else ''}, best first"
    figure.text(left, 1 - 16 / height_px, title, size=15, weight="bold", color=_INK, va="top", parse_math=False)
    if report.best is not None:
        cuts = ", ".join(f"{t:.3f}" for t in report.best.boundaries)
        told = f"Best: {report.best.name} ({report.best.origin}), " + (f"boundaries at t = {cuts}" if cuts else "a single network")
        figure.text(left, 1 - 44 / height_px, told, size=10.5, color=_INK, va="top", parse_math=False)


def _colours(trials: Sequence[TrialRow]) -> "ScalarMappable":
    """Return the map from scores to colours."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scores = [trial.score for trial in trials if trial.score is not None and trial.has_score]
    low, high = without_outliers(scores) if scores else (0.0, 1.0)
    if low == high:
        low, high = low - max(abs(low), 1.0) * 1e-3, high + max(abs(high), 1.0) * 1e-3
    return ScalarMappable(Normalize(low, high), _SCORES)


def _trial(axes: "Axes", row: int, trial: TrialRow, colours: "ScalarMappable", *, best: bool, size: float) -> None:
    """Draw one row: name and origin, the experts' intervals, score and state."""
    low, high = LOG_SNR_SHOWN
    inner = sorted(min(max(log_snr(t), low), high) for t in trial.boundaries)
    edges = [low, *inner, high]
    height = _HEIGHT[trial.state]
    failed = trial.state == "failed"
    face: Any = "white" if failed or trial.state == "queued" else _EMPTY
    if trial.score is not None and trial.has_score and not failed:
        face = colours.to_rgba(np.array([trial.score]))[0]
    for left, right in pairwise(edges):
        axes.barh(
            row, right - left, height, left, color=face, edgecolor=_FAINT if failed or trial.state == "queued" else "white", linewidth=0.8,
            hatch="////" if failed else None, zorder=2,
        )  # fmt: skip
    axes.vlines(inner, row - 0.44, row + 0.44, color="white", linewidth=3.6, zorder=3)
    axes.vlines(inner, row - 0.44, row + 0.44, color=_FAINT if failed else _INK, linewidth=1.6, zorder=4)
    if best:
        axes.barh(row, high - low, 0.94, low, facecolor="none", edgecolor=_VERMILION, linewidth=2.2, zorder=6, clip_on=False)
    _row_text(axes, row, trial, best=best, size=size)


def _row_text(axes: "Axes", row: int, trial: TrialRow, *, best: bool, size: float) -> None:
    told = "" if trial.score is None or not trial.has_score else score_text(trial.score, trial.score_error)
    state = trial.state if trial.state != "running" or not trial.doing else trial.doing
    steps = "" if trial.state in ("queued", "failed") else f"{trial.rung:,}"
    colour, weight = _SOFT if trial.state == "failed" else _INK, "bold" if best else "normal"
    _columns(axes, row, (trial.name, trial.origin, told, steps, state), size=size, color=colour, weight=weight)


def _columns(axes: "Axes", row: float, texts: tuple[str, str, str, str, str], *, raised_px: float = 0, **style: Any) -> None:
    """Write name and origin left of a row, score, steps and state right of it."""
    from matplotlib.transforms import ScaledTranslation

    end = WIDTH_PX - _LEFT_PX - _RIGHT_PX
    places = ((24 - _LEFT_PX, "left", 14), (-12, "right", 16), (end + 14, "left", 22), (end + 204, "right", 9), (end + 214, "left", 14))
    for (x_px, side, length), text in zip(places, texts, strict=True):
        shift = ScaledTranslation(x_px / DPI, raised_px / DPI, axes.figure.dpi_scale_trans)
        place = axes.get_yaxis_transform() + shift
        axes.text(0, row, _shortened(text, length), transform=place, ha=side, va="center", parse_math=False, **style)


def _axis_legend(figure: "Figure", report: SearchReport, colours: "ScalarMappable", height_px: int) -> None:
    """Explain colours and marks under the axis."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    scored = [trial.score for trial in report.trials if trial.score is not None and trial.has_score and trial.state != "failed"]
    if scored:
        low, high = colours.get_clim()
        below, above = min(scored) < low, max(scored) > high
        place = figure.add_axes((_LEFT_PX / WIDTH_PX, 46 / height_px, 300 / WIDTH_PX, 14 / height_px))
        extend = "both" if below and above else "min" if below else "max" if above else "neither"
        bar = figure.colorbar(colours, cax=place, orientation="horizontal", extend=extend)
        bar.outline.set_visible(False)
        place.tick_params(labelsize=9, colors=_INK)
        place.locator_params(nbins=4)
        place.ticklabel_format(useOffset=False)
        arrow = "\u2191 higher is better" if report.higher_is_better else "\u2193 lower is better"
        place.set_title(f"{metric_label(report.metric)}   {arrow}", size=10, color=_INK, loc="left", parse_math=False)
    states = {trial.state for trial in report.trials}
    handles: list[Patch | Line2D] = []
    if "stopped" in states:
        handles.append(Patch(facecolor=_FAINT, label="thin: stopped early"))
    if "running" in states:
        handles.append(Patch(facecolor=_EMPTY, edgecolor=_FAINT, label="running, no score yet"))
    if "queued" in states:
        handles.append(Patch(facecolor="white", edgecolor=_FAINT, label="queued"))
    if "failed" in states:
        handles.append(Patch(facecolor="white", edgecolor=_FAINT, hatch="////", label="failed"))
    if report.best is not None:
        handles.append(Patch(facecolor="none", edgecolor=_VERMILION, linewidth=2, label="best"))
    handles.append(Line2D([], [], color=_PINK, linewidth=1.4, linestyle=(0, (4, 3)), label="boundaries of the paper"))
    corner = (1 - 24 / WIDTH_PX, 14 / height_px)
    figure.legend(handles=handles, loc="lower right", bbox_to_anchor=corner, ncols=3, frameon=False, fontsize=9.5, columnspacing=1.6)


def _band(
    axes: "Axes", centres: Array, values: Sequence[float], errors: Sequence[float], colour: str, *, logarithmic: bool = False
) -> None:
    """Draw values with their 95 % intervals; on a log axis, what is not positive hangs from the bottom as a triangle."""
    value, error = np.array(values), 1.96 * np.array(errors)
    inside = value > 0 if logarithmic else np.ones(len(value), dtype=bool)
    low, high = value - error, value + error
    if logarithmic:
        axes.set_yscale("log")
        positive = value[inside] if inside.any() else np.array([1.0])
        bottom, top = positive.min() / 3, positive.max() * 3
        # A band that reaches zero has no end on a log axis: it is cut at the edge of the panel.
        axes.set_ylim(bottom, top)
        low = np.maximum(low, bottom / 10)
        under = centres[~inside]
        axes.plot(under, np.full(len(under), 0.04), "v", color=colour, markersize=5, transform=axes.get_xaxis_transform())
    else:
        reach = 1.5 * max(float(np.ptp(value)), float(np.median(error)))
        axes.set_ylim(*padded([max(low.min(), value.min() - reach), min(high.max(), value.max() + reach)]))
    axes.fill_between(centres, low, high, color=colour, alpha=0.22, linewidth=0, zorder=2)
    axes.plot(centres[inside], value[inside], color=colour, linewidth=2, marker="o" if len(value) <= 24 else "", markersize=3.5, zorder=3)


def _mass(axes: "Axes", edges: Array, mass: Sequence[float]) -> None:
    """Fill the share of training draws of each level faintly behind a panel, in units of its own largest."""
    density = np.array(mass) / np.diff(edges)
    behind = axes.twinx()
    behind.set_ylim(0, max(float(density.max()), 1e-12) * 1.05)
    behind.stairs(density, edges, fill=True, color="#d9d9d9", alpha=0.6, linewidth=0)
    behind.set_axis_off()
    # The later of two axes lies on top; the curve belongs there.
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)


def _heat_map(figure: "Figure", axes: "Axes", profile: NoiseProfile) -> None:
    image = axes.pcolormesh(profile.edges, profile.edges, np.array(profile.affinity), cmap=_COSINES, vmin=-1, vmax=1)
    axes.set_ylim(profile.edges[0], profile.edges[-1])
    axes.invert_yaxis()
    box = axes.get_position()
    bar = figure.colorbar(image, cax=figure.add_axes((box.x1 + 0.012, box.y0, 0.011, box.height)))
    bar.outline.set_visible(False)
    bar.set_ticks([-1, -0.5, 0, 0.5, 1], labels=["\u22121 conflict", "\u22120.5", "0", "0.5", "1 agree"])
    bar.ax.tick_params(labelsize=9, colors=_INK)


def _noise_scale(axes: "Axes", edges: Array, title: str) -> None:
    axes.set_xlim(edges[0], edges[-1])
    axes.set_title(title, size=11.5, weight="bold", color=_INK, loc="left", pad=24)
    axes.set_xlabel("log-SNR \u03bb", size=9.5, color=_INK, labelpad=1)
    top = axes.secondary_xaxis("top")
    shown = [t for t in NOISE_LEVELS if edges[0] <= log_snr(t) <= edges[-1]]
    top.set_xticks([log_snr(t) for t in shown], [f"{t:g}" for t in shown])
    axes.annotate("t", (0, 1), (-20, 5), xycoords="axes fraction", textcoords="offset points", size=9, color=_INK)
    for each in (axes, top):
        each.tick_params(labelsize=9, colors=_INK)


def _cuts(axes: "Axes", cuts: dict[str, list[float]], edges: Array) -> None:
    for name, colour, style in _CUT_STYLES:
        for at in cuts.get(name, ()):
            if edges[0] <= at <= edges[-1]:
                axes.axvline(at, color=colour, linestyle=style, linewidth=1.8, zorder=4)


def _blocks(axes: "Axes", inner: "list[float] | None", edges: Array) -> None:
    """Frame, on the diagonal of the heat map, the levels that share an expert."""
    from matplotlib.patches import Rectangle

    if inner is None:
        return
    for low, high in pairwise([edges[0], *sorted(inner), edges[-1]]):
        axes.add_patch(Rectangle((low, low), high - low, high - low, fill=False, edgecolor=_VERMILION, linewidth=2, zorder=5))


def _profile_legend(figure: "Figure", cuts: dict[str, list[float]]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Patch | Line2D] = [
        Patch(facecolor="#d9d9d9", alpha=0.6, label="training draws per unit of log-SNR"),
        Patch(facecolor=_FAINT, alpha=0.3, label="95 % interval"),
    ]
    for name, colour, style in _CUT_STYLES:
        if cuts.get(name):
            at = ", ".join(f"{noise_level(cut):.3f}" for cut in cuts[name])
            handles.append(Line2D([], [], color=colour, linestyle=style, linewidth=2, label=f"{name}: t = {at}"))
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.012, 0.0), ncols=4, frameon=False, fontsize=9.5, columnspacing=1.8)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}\u2026"
