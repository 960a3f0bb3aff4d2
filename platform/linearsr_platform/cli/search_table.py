"""The trials of a boundary search in a terminal: what moves while it runs, one line for each event, and the tables at the end."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from linearsr_platform.cli.trainer_table import clock_time
from linearsr_platform.report.markup import metric_label
from linearsr_platform.report.search_model import Comparison, SearchReport, TrialRow, conclusions, ranked, score_text

ROWS_SHOWN = 15
"""Trials that a terminal shows at most while the search runs."""
ORIGIN_FROM_COLUMNS = 96
"""Terminal width from which the live table says where boundaries come from."""
WIDTH = 100
"""Columns of tables that are not written to a terminal."""
ENDED = frozenset({"stopped", "done", "failed"})
STYLES = {"queued": "dim", "running": "cyan", "stopped": "dim", "done": "green", "failed": "red"}
VERDICT_STYLES = {"better": "green", "worse": "red", "no difference": "", "not known": "yellow", "reference": "dim"}


@dataclass(frozen=True, kw_only=True)
class SearchView:
    """The state of a running search, as one call reported it."""

    rows: tuple[TrialRow, ...]
    """Best first."""
    total: int
    """Trials that are to end."""
    left_s: float | None
    updated_s: float
    best: TrialRow | None

    @property
    def ended(self) -> int:
        """Trials that have ended."""
        return sum(row.state in ENDED for row in self.rows)

    def counted(self, now_s: float) -> str:
        """Write how many trials have ended and how long the others may take."""
        left = "" if self.left_s is None else f", about {clock_time(self.left_s - (now_s - self.updated_s))} left"
        return f"{self.ended} of {self.total} trials{left}"


def output_console() -> Console:
    """Return a console on standard output that is wide enough for tables where no terminal limits it."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def live_trials(view: SearchView, now_s: float, console: Console, height: int) -> RenderableType:
    """Return the table of a running search with at most `height` trials: those that run, then the best; the others are counted."""
    shown = sorted(view.rows, key=lambda row: row.state != "running")[: max(1, min(height, ROWS_SHOWN))]
    ascii_only = is_ascii(console)
    table = _table("trial", "boundaries t")
    wide = console.width >= ORIGIN_FROM_COLUMNS
    if wide:
        table.add_column("from", no_wrap=True)
    for title in ("steps", "score", "trained+cached" if wide else "new+old"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for row in shown:
        style = "bold" if view.best is not None and row.name == view.best.name else ""
        table.add_row(
            Text(row.name, style=style),
            levels_text(row.boundaries),
            *((row.origin,) if wide else ()),
            f"{row.rung}/{row.rungs}",
            _score(row, ascii_only=ascii_only),
            f"{row.trained}+{row.cached}",
            Text(row.doing if row.state == "running" and row.doing else row.state, style=STYLES[row.state]),
        )
    # The table is last: where it is taller than the terminal, only rows are cut off.
    parts: list[RenderableType] = [Text(view.counted(now_s))]
    if view.best is not None:
        best = f"best so far: {view.best.name} ({view.best.origin})  {_score(view.best, ascii_only=ascii_only)}"
        parts.append(Text(f"{best}  t {levels_text(view.best.boundaries)}", style="bold"))
    parts.append(table)
    hidden = Counter(row.state for row in view.rows) - Counter(row.state for row in shown)
    if hidden:
        states = ", ".join(f"{count} {state}" for state, count in hidden.items())
        parts.append(Text(f"and {hidden.total()} more: {states}", style="dim"))
    return Group(*parts)


def trial_event(row: TrialRow, before: TrialRow | None) -> str | None:
    """Return what happened to a trial since `before` in words, or None if nothing did that is worth a line."""
    ended = row.state in ENDED and (before is None or before.state != row.state)
    reported = row.has_score and (before is None or (before.rung, before.score) != (row.rung, row.score))
    if not ended and not reported:
        return None
    if row.state == "failed":
        return f"failed after {row.rung}/{row.rungs} steps" + (f": {row.reason}" if row.reason else "")
    parts: list[str] = [row.state] if ended else []
    parts += [f"score {_score(row, ascii_only=True)}"] if row.has_score else []
    parts += [f"step {row.rung}/{row.rungs}", f"experts trained {row.trained}, cached {row.cached}"]
    parts += [f"{row.origin} at t {levels_text(row.boundaries)}"]
    return ", ".join(parts)


def search_table(trials: Sequence[TrialRow], *, metric: str, higher_is_better: bool, console: Console) -> Table:
    """Return the final ranking, best first; up to 4 experts take 100 columns, and on a narrower console 80."""
    wide = console.width >= ORIGIN_FROM_COLUMNS
    table = _table("", "trial", "boundaries t")
    table.columns[0].justify = "right"
    if wide:
        table.add_column("from", no_wrap=True)
    better = "higher" if higher_is_better else "lower"
    for title in (f"{metric_label(metric)} ({better})", "steps", "trained+cached" if wide else "new+old"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for place, row in enumerate(ranked(trials, higher_is_better), 1):
        table.add_row(
            str(place) if row.has_score and row.state != "failed" else "",
            Text(row.name, style="bold" if place == 1 and row.has_score else ""),
            levels_text(row.boundaries),
            *((row.origin,) if wide else ()),
            _score(row, ascii_only=is_ascii(console)),
            f"{row.rung}/{row.rungs}",
            f"{row.trained}+{row.cached}",
            Text(row.state, style=STYLES[row.state]),
        )
    return table


def comparison_table(comparisons: Sequence[Comparison], *, metric: str, console: Console) -> Table:
    """Return the comparison over several seeds, with differences to the reference and their 95 % intervals."""
    table = _table("boundaries", "t")
    seeds = sorted({one.seeds for one in comparisons})
    count = "-".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))) if seeds else "0"
    for title in (f"{metric_label(metric)}, {count} seed{'s' if count != '1' else ''}", "difference", "95 % interval"):
        table.add_column(title, justify="right", no_wrap=title != "95 % interval")
    table.add_column("verdict", no_wrap=True)
    for one in comparisons:
        width = None if one.interval is None else (one.interval[1] - one.interval[0]) / 4
        ends = () if one.interval is None else tuple(_signed(end, width) for end in one.interval)
        table.add_row(
            one.label,
            levels_text(one.boundaries),
            score_text(one.score, one.score_error, plus_minus="+-" if is_ascii(console) else "\u00b1"),
            "" if one.difference is None else _signed(one.difference, width),
            " to ".join(ends),
            Text(one.verdict, style=VERDICT_STYLES[one.verdict]),
        )
    return table


def print_search(report: SearchReport, console: Console | None = None) -> None:
    """Write the result of a search for people: the verdict, the comparison, the ranking, and what the cache saved."""
    shown_on = console if console is not None else output_console()
    for index, sentence in enumerate(conclusions(report)):
        told = sentence.replace("\u00b1", "+-") if is_ascii(shown_on) else sentence
        shown_on.print(Text(told, style="" if index else "bold"), soft_wrap=True)
    if report.comparisons:
        shown_on.print()
        shown_on.print(comparison_table(report.comparisons, metric=report.metric, console=shown_on))
    if report.trials:
        shown_on.print()
        shown_on.print(search_table(report.trials, metric=report.metric, higher_is_better=report.higher_is_better, console=shown_on))
    for row in report.trials:
        if row.state == "failed" and row.reason:
            shown_on.print(Text(f"{row.name} failed: {row.reason}", style="red"), soft_wrap=True)
    asked = report.trained + report.cached
    if asked:
        saved = f"{report.cached} of {asked} expert trainings ({report.cached / asked:.0%}) came from the cache"
        shown_on.print(Text(f"\n{saved}"), soft_wrap=True)


def levels_text(boundaries: Sequence[float]) -> str:
    """Write noise levels as `.223 .875 .939`, or that there is a single expert."""
    return " ".join(f"{t:.3f}".removeprefix("0") for t in boundaries) or "single expert"


def is_ascii(console: Console) -> bool:
    """Return whether a console may be unable to show more than ASCII."""
    return not console.encoding.lower().startswith("utf")


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for title in titles:
        # Many boundaries may take a second line; a number is never cut.
        breaks = title in ("t", "boundaries t", "boundaries")
        table.add_column(title, no_wrap=not breaks, min_width=9 if breaks else None)
    return table


def _score(row: TrialRow, *, ascii_only: bool) -> str:
    if row.score is None or not row.has_score:
        return ""
    return score_text(row.score, row.score_error, plus_minus="+-" if ascii_only else "\u00b1")


def _signed(value: float, error: float | None) -> str:
    return score_text(value, error, signed=True).split(" ")[0]
