"""The score tables: means and photographs beside their difference to bicubic, and each protocol's means with their intervals."""

from collections.abc import Sequence

from linearsr_platform.report.charts import arrow
from linearsr_platform.report.markup import Markup, difference, element, join, metric_label, number
from linearsr_platform.report.model import EvaluationRow, ProtocolScores, ReportData, measured, orientation

Scored = Sequence[tuple[EvaluationRow, dict[str, float]]]
"""Rows of one table body with the values to show: means, or those of one photograph."""


def evaluation(data: ReportData) -> Markup:
    """Return the table of means, the values of each photograph, and the protocols; empty without an evaluation."""
    if not data.evaluation:
        return Markup("")
    means = element("tbody", *_rows(data, [(row, row.values) for row in data.evaluation]))
    return join(
        _table(data, means),
        element("p", _claim(data), class_="note"),
        *(_under(data, scores) for scores in data.protocols),
        element("details", element("summary", "Each photograph"), _table(data, *_photographs(data)), open=True),
        element("details", element("summary", "Protocol of each number"), _protocols(data), open=True),
    )


def verdict(value: float, baseline: float, metric: str) -> str:
    """Return the style class of a difference: `good`, `bad`, or `same` if it is neither or the orientation is not known."""
    better = orientation(metric)
    if better is None or value == baseline:
        return "same"
    return "good" if (value > baseline) == better else "bad"


def _table(data: ReportData, *bodies: Markup) -> Markup:
    heads = [
        element("th", metric_label(column.name), element("span", arrow(column.name), class_="arrow"), scope="col", title=column.protocol)
        for column in data.metrics
    ]
    head = element("thead", element("tr", element("th", "Estimate", scope="col"), *heads))
    return element("div", element("table", head, *bodies, class_="scores"), class_="scroll")


def _under(data: ReportData, scores: ProtocolScores) -> Markup:
    """Return one protocol's table: means with the 95 % interval under each."""
    metrics = list(dict.fromkeys(metric for means in scores.values.values() for metric in means))
    heads = [element("th", metric_label(name), element("span", arrow(name), class_="arrow"), scope="col") for name in metrics]
    rows = []
    for label, means in scores.values.items():
        cells = []
        for metric in metrics:
            ends = scores.intervals.get(label, {}).get(metric)
            reach = "" if ends is None else f"{number(ends[0])} \u2026 {number(ends[1])}"
            cells.append(element("td", number(measured(means, metric)), element("small", reach, class_="reach")))
        rows.append(element("tr", element("th", label, scope="row", class_="estimate"), *cells))
    head = element("thead", element("tr", element("th", "Estimate", scope="col"), *heads))
    hashes = [f"{metric_label(metric)} {digest[:12]}" for metric, digest in scores.weights.items() if digest != "none"]
    facts = [f"{scores.images} images", f"test set {data.test_set[:12]}", *([data.tags_read] if data.tags_read else [])]
    facts += [f"weights {', '.join(hashes)}"] if hashes else []
    return element(
        "details",
        element("summary", f"Under {scores.name}, with 95 % intervals"),
        element("div", element("table", head, element("tbody", *rows), class_="scores reaches"), class_="scroll"),
        element("p", f"{scores.about}. {'; '.join(facts)}.", class_="note"),
        open=True,
    )


def _photographs(data: ReportData) -> list[Markup]:
    bodies = []
    for name in data.photographs:
        title = element("tr", element("th", name, colspan=str(len(data.metrics) + 1), scope="rowgroup", class_="group"))
        bodies.append(element("tbody", title, *_rows(data, [(row, row.per_photograph.get(name, {})) for row in data.evaluation])))
    return bodies


def _rows(data: ReportData, scored: Scored) -> list[Markup]:
    written = []
    for row, values in scored:
        cells = [_cell(column.name, row, values, scored) for column in data.metrics]
        written.append(element("tr", element("th", row.label, scope="row", class_="estimate"), *cells))
    return written


def _cell(metric: str, row: EvaluationRow, values: dict[str, float], scored: Scored) -> Markup:
    value = measured(values, metric)
    rivals = [rival for _, others in scored if (rival := measured(others, metric)) is not None]
    better = orientation(metric)
    best = value is not None and better is not None and value == (max(rivals) if better else min(rivals))
    baseline = next((measured(others, metric) for rival, others in scored if rival.kind == "bicubic"), None)
    delta = element("small", "")
    if value is not None and baseline is not None and row.kind != "bicubic":
        delta = element("small", difference(value, baseline), class_=verdict(value, baseline, metric))
    return element("td", element("b", number(value)) if best else number(value), delta)


def _claim(data: ReportData) -> str:
    count = len(data.photographs)
    routed, bicubic = measured(data.values("routed"), data.perceptual), measured(data.values("bicubic"), data.perceptual)
    held = ""
    if routed is not None and bicubic is not None:
        held = " It does." if verdict(routed, bicubic, data.perceptual) == "good" else " It does not."
    return (
        f"Means over {count} held-out photograph{'s' if count != 1 else ''}; bold is best, the smaller number is the difference to "
        f"bicubic. Claimed beforehand: the routed sampler beats bicubic on {metric_label(data.perceptual)}.{held}"
    )


def _protocols(data: ReportData) -> Markup:
    sharing: dict[str, list[str]] = {}
    for column in data.metrics:
        sharing.setdefault(column.protocol, []).append(metric_label(column.name))
    pairs = [join(element("dt", ", ".join(names)), element("dd", element("code", protocol))) for protocol, names in sharing.items()]
    return element("dl", *pairs, class_="protocols")
