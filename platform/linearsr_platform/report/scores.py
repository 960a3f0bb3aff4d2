"""The score table: means and photographs, each number beside its difference to bicubic, and the protocols behind them."""

from collections.abc import Sequence

from linearsr_platform.report.charts import arrow
from linearsr_platform.report.markup import Markup, difference, element, join, metric_label, number
from linearsr_platform.report.model import EvaluationRow, ReportData, measured, orientation

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
