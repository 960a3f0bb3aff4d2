"""HTML and SVG from Python calls, escaped by default, and the formats of numbers on the page."""

from html import escape
from math import isfinite

LEAVES = frozenset({"circle", "img", "input", "line", "meta", "path", "rect"})
"""Tags written without a closing tag."""
DASH = "\u2013"
MINUS = "\u2212"
ARROWS = {True: "\u2191", False: "\u2193"}
"""higher_is_better -> arrow."""


class Markup(str):
    """Text that is already HTML; every other string is escaped where it enters the page."""

    __slots__ = ()


def join(*children: str) -> Markup:
    """Concatenate children, escaping those that are not `Markup`."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))


def element(tag: str, /, *children: str, **attributes: str | float | bool | None) -> Markup:
    """Return one element. `class_` and `aria_label` become `class` and `aria-label`; None and False leave an attribute out."""
    written = []
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        key = name.rstrip("_").replace("_", "-")
        written.append(f" {key}" if value is True else f' {key}="{escape(value) if isinstance(value, str) else compact(value)}"')
    head = f"<{tag}{''.join(written)}"
    return Markup(f"{head}/>" if tag in LEAVES else f"{head}>{join(*children)}</{tag}>")


def compact(value: float) -> str:
    """Write a coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def number(value: float | None, *, signed: bool = False) -> str:
    """Write a metric value: two decimals from 10 on, four below; a dash when there is none."""
    if value is None or not isfinite(value):
        return DASH
    return f"{value:{'+' if signed else ''}.{2 if abs(value) >= 10 else 4}f}".replace("-", MINUS)


def difference(value: float, baseline: float) -> str:
    """Write `value - baseline` with the decimals of `baseline`, so that the two can be added by eye."""
    return f"{value - baseline:+.{2 if abs(baseline) >= 10 else 4}f}".replace("-", MINUS)


def duration(seconds: float) -> str:
    """Write a duration as `4.2 s`, `1 min 05 s` or `2 h 03 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def metric_label(name: str) -> str:
    """Write a metric as people do: `psnr_y` is PSNR-Y; `loss` stays as it is."""
    return name if name == "loss" else name.upper().replace("_", "-")
