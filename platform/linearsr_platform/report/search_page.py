"""The report of a boundary search as one HTML page that needs nothing but itself."""

import base64
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.resources import files

from linearsr.experts import log_snr
from linearsr_platform.report.html import CONTENT_POLICY
from linearsr_platform.report.markup import ARROWS, DASH, MINUS, Markup, duration, element, join, metric_label
from linearsr_platform.report.search_model import Comparison, SearchReport, TrialRow, conclusions, ranked, score_text

STYLES = {"better": "good", "worse": "bad", "no difference": "same", "not known": "same", "reference": "same"}
"""Verdict -> style class."""
COMPARED = (
    "Each set of boundaries was trained again with the same seeds; differences are paired by seed and crop. "
    "The intervals hold with 95 % all together."
)
TRIED = (
    "Every trial, best first. A higher rung goes first: scores after different numbers of steps are not compared. Each has one seed, "
    "so the order of near neighbours is luck."
)
PROFILE = (
    "Measured on the trained network before any expert was trained. Where gradients agree (blue), levels gain from sharing an "
    "expert; where they point against each other (red), they harm each other."
)


def render_search(report: SearchReport, pictures: Mapping[str, bytes]) -> str:
    """Return the whole page; parts without data are left out.

    Args:
        report: everything but the pictures.
        pictures: PNG files by name: `axis` from `plot_axis`, `profile` from `plot_profile`; either may be missing.
    """
    contents = (
        ("comparison", "Comparison", COMPARED, _comparisons(report)),
        ("recipe", "For the recipe", "", _recipe(report)),
        ("axis", "Boundaries on the noise axis", "", _picture(pictures.get("axis"), _axis_text(report))),
        ("ranking", "Ranking", TRIED, _ranking(report)),
        ("proposals", "Proposals", "Tried first: what is worth trying before anything is known of the scores.", _proposals(report)),
        ("profile", "What the gradients say", PROFILE, _picture(pictures.get("profile"), _profile_text(report))),
        ("cost", "What it cost", "", _cost(report)),
    )
    filled = [content for content in contents if content[3]]
    links = [element("a", title, href=f"#{key}") for key, title, _, _ in filled]
    body = [
        element("section", element("h2", title), element("p", lead, class_="lead") if lead else Markup(""), content, id=key)
        for key, title, lead, content in filled
    ]
    page = element(
        "body",
        element("header", element("p", "LinearSR boundary search", class_="kicker"), element("h1", report.name), _verdict(report)),
        _tiles(report),
        element("nav", *links, aria_label="Sections"),
        element("main", *body),
        _footer(report),
    )
    return f"<!doctype html>\n{element('html', _head(report), page, lang='en')}\n"


def _head(report: SearchReport) -> Markup:
    style = files("linearsr_platform.report").joinpath("report.css").read_text(encoding="utf-8")
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=CONTENT_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{report.name} \u00b7 LinearSR boundary search"),
        element("style", Markup(style)),
    )


def _verdict(report: SearchReport) -> Markup:
    """Return the verdict, the other conclusions, and when it ran."""
    verdict = next((contrast.verdict for contrast in report.contrasts()), "no difference")
    sentences = [text.replace(" -", f" {MINUS}") for text in conclusions(report)]
    first = element("p", element("span", element("b", sentences[0])), class_=f"verdict {STYLES[verdict]}")
    others = [element("p", element("span", text), class_="verdict same") for text in sentences[1:]]
    started = datetime.fromisoformat(report.started)
    count = len(report.trials)
    identity = element(
        "p",
        element("time", f"{started:%d %B %Y, %H:%M} {started.tzname() or ''}".strip(), datetime=report.started),
        element("span", duration(report.seconds)),
        element("span", f"{count} trial{'s' if count != 1 else ''}"),
        class_="identity",
    )
    return join(first, *others, identity)


def _tiles(report: SearchReport) -> Markup:
    chosen = _chosen(report)
    tiles = []
    if chosen is not None and report.best is not None and report.best.score is not None:
        origin = next((trial.origin for trial in report.trials if trial.boundaries == chosen), "")
        experts = f"{len(chosen) + 1} expert{'s' if chosen else ''}"
        tiles.append(_tile("Best boundaries, t", _levels(chosen), f"{experts}, {origin}" if origin else experts))
        known = report.winner
        score, error = (known.score, known.score_error) if known else (report.best.score, report.best.score_error)
        seeds = f"{known.seeds} seed{'s' if known.seeds > 1 else ''}" if known else "one seed"
        name = f"{metric_label(report.metric)} {ARROWS[report.higher_is_better]}"
        tiles.append(_tile(name, _number(score, error).split(" ")[0], f"{_number(score, error)}, {seeds}"))
    asked = report.trained + report.cached
    if asked:
        tiles.append(
            _tile("Trainings saved", f"{report.cached / asked:.0%}", f"{report.cached} of {asked} experts came from an earlier trial")
        )
    return element("div", *tiles, class_="tiles") if tiles else Markup("")


def _tile(title: str, value: str, note: str) -> Markup:
    return element("div", element("h2", title), element("b", value), element("span", note), class_="tile")


def _chosen(report: SearchReport) -> tuple[float, ...] | None:
    """Return the boundaries to which the search came: after the comparison, or else of the best trial."""
    if report.winner is not None:
        return report.winner.boundaries
    return None if report.best is None else report.best.boundaries


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, words: frozenset[int] = frozenset()) -> Markup:
    """Return a table; the first column and those in `words` are aligned left, the others right, and only the last may break lines."""
    if not rows:
        return Markup("")
    styles = [
        None if i == len(heads) - 1 and i in words else f"white-space:nowrap{'' if i == 0 or i in words else ';text-align:right'}"
        for i in range(len(heads))
    ]
    head = [element("th", title, scope="col", style=style) for title, style in zip(heads, styles, strict=True)]
    body = []
    for row in rows:
        cells = [element("td", cell, style=style) for cell, style in zip(row[1:], styles[1:], strict=True)]
        body.append(element("tr", element("th", row[0], scope="row", style=styles[0]), *cells))
    return element("div", element("table", element("thead", element("tr", *head)), element("tbody", *body)), class_="scroll")


def _comparisons(report: SearchReport) -> Markup:
    heads = (
        "Boundaries",
        "t",
        "Seeds",
        f"{metric_label(report.metric)} {ARROWS[report.higher_is_better]}",
        "Difference",
        "95 % interval",
        "",
    )
    rows = [_compared(comparison) for comparison in report.comparisons]
    reference = next((comparison.label for comparison in report.comparisons if comparison.verdict == "reference"), None)
    note = element("p", f"Differences are to \u201c{reference}\u201d.", class_="note") if reference else Markup("")
    table = _table(heads, rows, words=frozenset({1, 6}))
    return join(table, note) if table else table


def _compared(comparison: Comparison) -> tuple[str, ...]:
    width = None if comparison.interval is None else (comparison.interval[1] - comparison.interval[0]) / 4
    between = DASH
    if comparison.interval is not None:
        between = " to ".join(_signed(end, width) for end in comparison.interval)
    return (
        comparison.label,
        _levels(comparison.boundaries),
        str(comparison.seeds),
        _number(comparison.score, comparison.score_error),
        DASH if comparison.difference is None else _signed(comparison.difference, width),
        between,
        element("span", comparison.verdict, class_=STYLES[comparison.verdict]),
    )


def _recipe(report: SearchReport) -> Markup:
    chosen = _chosen(report)
    if chosen is None:
        return Markup("")
    fragment = f"experts:\n  boundaries: [{', '.join(f'{t:.6g}' for t in chosen)}]"
    parts = [element("pre", element("code", fragment))]
    winner = report.winner
    paper = next((contrast.verdict for contrast in report.contrasts() if contrast.label == "paper"), None)
    if winner is not None and winner.verdict == "better":
        parts.append(
            element("p", f"Those of \u201c{winner.label}\u201d: they are better than the best that the trials found.", class_="note")
        )
    elif paper == "no difference":
        keeps = element("code", "boundaries: bisection")
        parts.append(element("p", "The paper's boundaries score as well within noise: ", keeps, " keeps them.", class_="note"))
    return join(*parts)


def _picture(png: bytes | None, text: str) -> Markup:
    if png is None:
        return Markup("")
    source = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
    return element("div", element("figure", element("img", src=source, alt=text)), class_="wholes", style="--versions: 1; margin-top: 14px")


def _axis_text(report: SearchReport) -> str:
    best = "" if report.best is None else f"; the best, {report.best.name}, has its boundaries at t = {_levels(report.best.boundaries)}"
    return f"Intervals of the experts of {len(report.trials)} trials over log-SNR, coloured by {metric_label(report.metric)}{best}"


def _profile_text(report: SearchReport) -> str:
    cuts = [f"{proposal.name} at t = {_levels(proposal.boundaries)}" for proposal in report.proposals if proposal.name == "least-conflict"]
    return "Loss, gradient norm and cosine similarity of gradients over log-SNR" + "".join(f"; {cut}" for cut in cuts)


def _ranking(report: SearchReport) -> Markup:
    heads = (
        "Trial",
        "Boundaries, t",
        "From",
        f"{metric_label(report.metric)} {ARROWS[report.higher_is_better]}",
        "Steps",
        "Trained",
        "Cached",
        "Time",
        "State",
    )
    rows = [
        _ranked(trial, best=report.best is not None and trial.name == report.best.name)
        for trial in ranked(report.trials, report.higher_is_better)
    ]
    return _table(heads, rows, words=frozenset({1, 2, 8}))


def _ranked(trial: TrialRow, *, best: bool) -> tuple[str, ...]:
    style = "good" if best else "bad" if trial.state == "failed" else "same" if trial.state in ("stopped", "queued") else None
    state = element("span", "best" if best else trial.state, class_=style)
    return (
        element("b", trial.name) if best else trial.name,
        _levels(trial.boundaries),
        trial.origin,
        DASH if trial.score is None or not trial.has_score else _number(trial.score, trial.score_error),
        f"{trial.rung:,} / {trial.rungs:,}",
        str(trial.trained),
        str(trial.cached),
        duration(trial.seconds),
        join(state, element("small", f" {trial.reason}")) if trial.reason else state,
    )


def _proposals(report: SearchReport) -> Markup:
    tried = {(trial.origin, len(trial.boundaries)): trial for trial in report.trials}
    rows = []
    for proposal in report.proposals:
        trial = tried.get((proposal.name, len(proposal.boundaries)))
        score = DASH if trial is None or trial.score is None else _number(trial.score, trial.score_error)
        at = ", ".join(f"{log_snr(t):.2f}" for t in proposal.boundaries).replace("-", MINUS) or DASH
        rows.append((proposal.name, _levels(proposal.boundaries), at, score, proposal.note))
    return _table(("Proposal", "t", "log-SNR", metric_label(report.metric), ""), rows, words=frozenset({1, 2, 4}))


def _cost(report: SearchReport) -> Markup:
    asked = report.trained + report.cached
    if not asked:
        return Markup("")
    saved = (
        f"The trials asked for {asked} trainings of an expert. {report.trained} were run; {report.cached} ({report.cached / asked:.0%}) "
        "had the interval of an expert trained before and took it from the store."
    )
    states = Counter(trial.state for trial in report.trials)
    counts = [f"{states['done']} ran to the end", f"{states['stopped']} were stopped early", f"{states['failed']} failed"]
    return join(element("p", saved, class_="lead"), element("ul", *(element("li", count) for count in counts), class_="counts"))


def _footer(report: SearchReport) -> Markup:
    encoded = base64.b64encode(json.dumps(report.to_json(), indent=1, allow_nan=False).encode()).decode("ascii")
    link = element(
        "a", "the numbers of this page as JSON", href=f"data:application/json;base64,{encoded}", download=f"{report.name}-search.json"
    )
    return element("footer", element("p", join("Save ", link, ". Method: LinearSR, ICLR 2026, arXiv 2510.08771.")))


def _levels(boundaries: tuple[float, ...]) -> str:
    return ", ".join(f"{t:.3f}" for t in boundaries) or "single expert"


def _number(value: float, error: float | None) -> str:
    return score_text(value, error).replace("-", MINUS)


def _signed(value: float, error: float | None) -> str:
    return score_text(value, error, signed=True).split(" ")[0].replace("-", MINUS)
