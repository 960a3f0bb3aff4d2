"""The sections of the report. Each takes the data and returns its content, empty if there is nothing to show."""

from collections.abc import Iterable, Sequence
from math import isfinite

from linearsr.experts import intervals, log_snr, steps_per_expert
from linearsr_platform.report.axis import noise_axis
from linearsr_platform.report.charts import arrow, curve_panel, expert_class, plane, sweep_panel, trainer_class
from linearsr_platform.report.markup import DASH, MINUS, Markup, duration, element, join, metric_label, number
from linearsr_platform.report.model import GateRow, PromotionRecord, ReportData, StageRecord, TrackingRecord, TrainerCurve, measured

EMPTY = Markup("")
QUARANTINED_SHOWN = 20
MARKS = {"done": "\u2713", "skipped": "\u21b7", "failed": "\u2717"}


def trade_off(data: ReportData) -> Markup:
    """Return steps against distortion, steps against perception, and the two against each other."""
    plotted = {"Distortion": data.distortion, "Perception": data.perceptual}
    sweep = [point for point in data.sweep if all(measured(point.values, metric) is not None for metric in plotted.values())]
    if not sweep:
        return EMPTY
    bicubic = data.values("bicubic")
    figures = [
        _figure(f"{what}: {metric_label(metric)}{arrow(metric)}", sweep_panel(sweep, metric, measured(bicubic, metric)))
        for what, metric in plotted.items()
    ]
    figures.append(_figure("Both at once, labelled by steps", plane(sweep, data.evaluation, data.distortion, data.perceptual)))
    return element("div", *figures, class_="panels three")


def _figure(title: str, chart: Markup) -> Markup:
    return element("figure", element("figcaption", title), chart)


def training(data: ReportData) -> Markup:
    """Return one row for each trainer: its knee in words, its curves beside them."""
    shown = [curve for curve in data.trainers if curve.history]
    stages = dict.fromkeys(curve.stage for curve in shown)
    parts = []
    for stage in stages:
        curves = [curve for curve in shown if curve.stage == stage]
        last_step = max(point["step"] for curve in curves for point in curve.history)
        if [curve.name for curve in curves] != [stage]:
            parts.append(element("h3", stage))
        parts += [_trainer(curve, last_step) for curve in curves]
    return join(*parts)


def _trainer(curve: TrainerCurve, last_step: float) -> Markup:
    kept = "knee" if curve.confirmed_at is not None else "no knee yet, best"
    knee = f"{kept} at step {curve.knee_step}" if curve.knee_step is not None else "no knee found"
    last = curve.history[-1]
    facts = [f"{int(last['step'])} steps"]
    seconds = measured(last, "seconds")
    if seconds is not None:
        facts.append(duration(seconds))
    facts.append(f"stopped by {curve.stopped_by}")
    confirmed = f", confirmed at {curve.confirmed_at}" if curve.confirmed_at is not None else ""
    words = element(
        "div",
        element("h4", element("i", class_=f"swatch {trainer_class(curve.name)}"), curve.name),
        element("p", element("b", knee), confirmed),
        element("p", curve.reason, class_="reason"),
        element("p", " \u00b7 ".join(facts), class_="facts"),
    )
    panels = [curve_panel(curve, metric, last_step=last_step) for metric in curve.metrics if curve.points(metric)]
    return element("div", words, element("div", *panels, class_="panels"), class_="trainer")


def guard(data: ReportData) -> Markup:
    """Return the trips of the guard in a table."""
    if not data.trips:
        return EMPTY
    heads = ("Trainer", "First bad step", "Seen", "Where", "What followed")
    head = element("tr", *(element("th", title, scope="col") for title in heads))
    rows = [
        element(
            "tr",
            element("th", trip.trainer if trip.trainer == trip.stage else f"{trip.stage} {trip.trainer}", scope="row"),
            *(element("td", cell) for cell in (f"{trip.step}", trip.seen, trip.evidence, trip.action)),
        )
        for trip in data.trips
    ]
    return element("div", element("table", element("thead", head), element("tbody", *rows)), class_="scroll")


def experts(data: ReportData) -> Markup:
    """Return the noise axis and a table of the intervals."""
    if not data.boundaries:
        return EMPTY
    served = steps_per_expert(data.sampling_times, data.boundaries)
    knees = {curve.name: curve.knee_step for curve in data.trainers}
    rows = []
    for index, (low, high) in enumerate(intervals(data.boundaries)):
        name = f"expert-{index + 1}"
        knee = knees.get(name)
        cells = (f"{low:.3f} \u2026 {high:.3f}", f"{_log_snr(high)} \u2026 {_log_snr(low)}")
        row = [
            element("th", element("i", class_=f"swatch {expert_class(index)}"), name, scope="row"),
            *(element("td", cell) for cell in cells),
        ]
        if data.sampling_times:
            row.append(element("td", f"{served[index]}") if served[index] else element("td", "0: never runs", class_="bad"))
        row.append(element("td", f"{knee}" if knee is not None else DASH))
        rows.append(element("tr", *row))
    heads = ("Expert", "Noise level t", "log-SNR \u03bb", *(("Sampler steps",) if data.sampling_times else ()), "Weights kept, step")
    head = element("tr", *(element("th", title, scope="col") for title in heads))
    return join(
        element("div", noise_axis(data.boundaries, data.overlap_log_snr, data.sampling_times), class_="scroll"),
        element("div", element("table", element("thead", head), element("tbody", *rows)), class_="scroll"),
    )


def _log_snr(t: float) -> str:
    value = log_snr(t)
    return f"{value:.2f}".replace("-", MINUS) if isfinite(value) else f"{MINUS if value < 0 else ''}\u221e"


def stages(data: ReportData) -> Markup:
    """Return the stages in order, each with a bar where its time lay within the whole."""
    total = sum(stage.seconds for stage in data.stages) or 1.0
    rows, elapsed = [], 0.0
    for stage in data.stages:
        rows.append(_stage(stage, elapsed / total, stage.seconds / total))
        elapsed += stage.seconds
    return element("div", element("table", element("tbody", *rows), class_="stages"), class_="scroll") if rows else EMPTY


def _stage(stage: StageRecord, start: float, share: float) -> Markup:
    bar = element("div", element("i", style=f"left:min({100 * start:.2f}%,100% - 2px);width:max({100 * share:.2f}%,2px)"), class_="bar")
    return element(
        "tr",
        element("td", element("span", MARKS[stage.status], class_="mark", role="img", aria_label=stage.status)),
        element("th", stage.name, scope="row"),
        element("td", bar),
        element("td", "skipped" if stage.status == "skipped" else duration(stage.seconds), class_="time"),
        element("td", stage.summary, class_="summary"),
        class_=stage.status,
    )


def data_used(data: ReportData) -> Markup:
    """Return the sizes of the splits and what was quarantined."""
    if data.splits is None:
        return EMPTY
    refused = len(data.quarantined)
    sizes = [element("li", element("b", f"{count}"), f" {name}") for name, count in data.splits.items()]
    sizes.append(element("li", element("b", f"{refused}"), " quarantined", class_="bad" if refused else None))
    parts = [element("ul", *sizes, class_="counts")]
    if refused:
        parts.append(_facts((image.file, image.reason) for image in data.quarantined[:QUARANTINED_SHOWN]))
    if refused > QUARANTINED_SHOWN:
        parts.append(element("p", f"and {refused - QUARANTINED_SHOWN} more in the manifest", class_="note"))
    return join(*parts)


def _facts(rows: Iterable[Sequence[str]]) -> Markup:
    written = [element("tr", element("th", what, scope="row"), *(element("td", cell) for cell in cells)) for what, *cells in rows]
    return element("div", element("table", element("tbody", *written), class_="facts"), class_="scroll")


def release(data: ReportData) -> Markup:
    """Return the promotion decision, where MLflow keeps everything, and what the model was made from."""
    parts = []
    if data.promotion is not None:
        parts.append(_promotion(data.promotion))
    if data.tracking is not None:
        parts += [element("h3", "MLflow"), _tracking(data.tracking)]
    if data.lineage:
        parts += [element("h3", "Lineage"), _facts((row.what, element("code", row.identity), row.detail) for row in data.lineage)]
    return join(*parts)


def _tracking(tracking: TrackingRecord) -> Markup:
    facts = {"Tracking server": tracking.uri, "Experiment": tracking.experiment}
    facts |= {"Model": tracking.model_uri} if tracking.model_uri else {}
    facts |= {"Version": tracking.model_version} if tracking.model_version else {}
    facts |= {f"Run of {stage}": run_id for stage, run_id in tracking.run_ids.items()}
    return _facts((what, element("code", value)) for what, value in facts.items())


def _promotion(decision: PromotionRecord) -> Markup:
    before = "no champion before" if decision.champion_version is None else f"champion before: version {decision.champion_version}"
    failed = sum(not rule.passed for rule in decision.rules)
    count = f"{failed} of {len(decision.rules)} rules failed" if failed else f"all {len(decision.rules)} rules hold"
    head = element(
        "p",
        element("b", "Promoted to champion" if decision.promoted else decision.state.capitalize()),
        element("span", f"version {decision.version}, {before}"),
        element("span", count if decision.rules else decision.reason),
        class_=f"verdict {'good' if decision.promoted else 'bad'}",
    )
    return join(head, _gate(decision.rules)) if decision.rules else head


def _gate(rules: Iterable[GateRow]) -> Markup:
    """Return the table of the gate's rules."""
    columns = ("Rule", "Asks for", "Challenger", "Champion", "Difference", "Verdict")
    header = element("tr", *(element("th", name, scope="col") for name in columns))
    return element("div", element("table", element("thead", header), element("tbody", *map(_rule, rules))), class_="scroll")


def _rule(rule: GateRow) -> Markup:
    interval = "" if rule.interval is None else f" [{_signed(rule.interval[0])}, {_signed(rule.interval[1])}], {rule.images} images"
    return element(
        "tr",
        element("th", rule.rule, scope="row"),
        element("td", rule.asks),
        element("td", _either(rule.challenger)),
        element("td", _either(rule.champion)),
        element("td", DASH if rule.difference is None else f"{_signed(rule.difference)}{interval}"),
        element(
            "td",
            element("b", "pass" if rule.passed else "fail", class_="good" if rule.passed else "bad"),
            f" {rule.note}" if rule.note else "",
        ),
    )


def _either(value: float | str | None) -> str:
    return value if isinstance(value, str) else number(value)


def _signed(value: float) -> str:
    return number(value, signed=True)
