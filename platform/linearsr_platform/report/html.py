"""The report as one HTML page that needs nothing but itself: it opens from disk, offline, and loads no other resource."""

import base64
from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files

from linearsr_platform import storage
from linearsr_platform.report import sections
from linearsr_platform.report.markup import Markup, difference, duration, element, join, metric_label, number
from linearsr_platform.report.model import EstimateKind, ReportData, measured
from linearsr_platform.report.pictures import photographs
from linearsr_platform.report.scores import evaluation, verdict
from linearsr_platform.report.strips import PhotoStrip

CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Makes the browser refuse anything that is not in the file."""


def render_report(data: ReportData, pictures: Sequence[PhotoStrip]) -> str:
    """Return the whole page; parts without data are left out.

    Args:
        data: everything but the pictures.
        pictures: held-out photographs; a version whose label equals that of an evaluation row carries its scores.
    """
    contents = (
        ("photographs", "Photographs", "Held out from training, degraded by the recipe, and brought back.", photographs(data, pictures)),
        ("scores", "Scores", "", evaluation(data)),
        ("trade-off", "Perception and distortion", TRADE_OFF, sections.trade_off(data)),
        ("training", "Training and knees", TRAINING, sections.training(data)),
        ("guard", "Rollbacks", GUARD, sections.guard(data)),
        ("experts", "Experts on the noise axis", EXPERTS, sections.experts(data)),
        ("stages", "Stages", "", sections.stages(data)),
        ("data", "Images", "", sections.data_used(data)),
        ("release", "Release", "", sections.release(data)),
    )
    filled = [content for content in contents if content[3]]
    links = [element("a", title, href=f"#{key}") for key, title, _, _ in filled]
    body = [
        element("section", element("h2", title), element("p", lead, class_="lead") if lead else Markup(""), content, id=key)
        for key, title, lead, content in filled
    ]
    page = element(
        "body",
        element("header", element("p", "LinearSR run report", class_="kicker"), element("h1", data.recipe_name), _identity(data)),
        _headline(data),
        element("nav", *links, aria_label="Sections"),
        element("main", *body),
        _footer(data),
    )
    return f"<!doctype html>\n{element('html', _head(data), page, lang='en')}\n"


TRADE_OFF = (
    "More sampler steps add detail that the input does not determine: it lies further from the one original, and may look more real. "
    "The tinted side is better than bicubic."
)
TRAINING = (
    "Each stage ends once its knee is confirmed, and the next one starts from the knee, not from the last step. The vertical line "
    "and the dot are the knee, the dotted line its confirmation; what came after the knee is faint and not used."
)
GUARD = "Where training went wrong, it went back to its last good state, cut its learning rate and skipped the data in between."
EXPERTS = (
    "One expert works at a time; noise falls from left to right. Thin bars: what an expert trains on. Dots: where the sampler calls it."
)


def write_report(html: str, url: str) -> None:
    """Write the page to a path or fsspec URL, whole or not at all."""
    storage.write_text(url, html)


def _head(data: ReportData) -> Markup:
    style = files("linearsr_platform.report").joinpath("report.css").read_text(encoding="utf-8")
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=CONTENT_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{data.recipe_name} \u00b7 LinearSR run report"),
        element("style", Markup(style)),
    )


def _identity(data: ReportData) -> Markup:
    started, finished = datetime.fromisoformat(data.started), datetime.fromisoformat(data.finished)
    took = duration((finished - started).total_seconds())
    return element(
        "p",
        element("span", "recipe ", element("code", data.recipe_hash[:12], title=data.recipe_hash)),
        element("span", "code ", element("code", data.code_version)),
        element("time", f"{started:%d %B %Y, %H:%M} {started.tzname() or ''}".strip(), datetime=data.started),
        element("span", took),
        class_="identity",
    )


def _headline(data: ReportData) -> Markup:
    tiles = [_failure(data), _gain(data, "one_step", data.distortion), _gain(data, "routed", data.perceptual), _kept(data), _release(data)]
    filled = [tile for tile in tiles if tile]
    return element("div", *filled, class_="tiles") if filled else Markup("")


def _tile(title: str, value: str, note: str, verdict: str = "") -> Markup:
    return element("div", element("h2", title), element("b", value), element("span", note, class_=verdict or None), class_="tile")


def _failure(data: ReportData) -> Markup:
    failed = next((stage for stage in data.stages if stage.status == "failed"), None)
    return _tile("Run failed at", failed.name, failed.summary, "bad") if failed else Markup("")


def _gain(data: ReportData, kind: EstimateKind, metric: str) -> Markup:
    row = data.row(kind)
    value, baseline = measured(data.values(kind), metric), measured(data.values("bicubic"), metric)
    if row is None or value is None or baseline is None:
        return Markup("")
    judged = verdict(value, baseline, metric)
    note = f"{difference(value, baseline)} against bicubic: {'better' if judged == 'good' else 'not better'}"
    return _tile(f"{metric_label(metric)}, {row.label}", number(value), note, judged)


def _kept(data: ReportData) -> Markup:
    last_stage = data.trainers[-1].stage if data.trainers else ""
    curves = [curve for curve in data.trainers if curve.stage == last_stage]
    if not curves:
        return Markup("")
    written = " \u00b7 ".join("\u2013" if curve.knee_step is None else f"{curve.knee_step}" for curve in curves)
    knees = sum(curve.confirmed_at is not None for curve in curves)
    return _tile("Weights kept, step", written, f"{last_stage}: {knees} of {len(curves)} at a knee, else the best")


def _release(data: ReportData) -> Markup:
    version = data.tracking.model_version if data.tracking else None
    if data.promotion is None or version is None:
        return Markup("")
    promoted = data.promotion.promoted
    return _tile("Release", f"version {version}", "promoted to champion" if promoted else "not promoted", "good" if promoted else "bad")


def _footer(data: ReportData) -> Markup:
    encoded = base64.b64encode(data.to_json().encode()).decode("ascii")
    link = element(
        "a", "the numbers of this page as JSON", href=f"data:application/json;base64,{encoded}", download=f"{data.recipe_name}-report.json"
    )
    return element("footer", element("p", join("Save ", link, ". Method: LinearSR, ICLR 2026, arXiv 2510.08771.")))
