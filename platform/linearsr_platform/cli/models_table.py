"""The registry in a terminal: versions, numbers, the gate's rules and the history."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from linearsr_platform.cli.search_table import output_console
from linearsr_platform.recipe.schema import STAGE_NAMES
from linearsr_platform.registry.compare import Comparison, MetricDifference, experts_of
from linearsr_platform.registry.gate import RuleOutcome
from linearsr_platform.registry.history import History, HistoryRow
from linearsr_platform.registry.models import ModelVersion
from linearsr_platform.registry.promotion import PromotionDecision, shown

ROWS = ("one_step", "routed", "bicubic")
HASH_SHOWN = 12
RULE_WIDTH = 38
"""Columns that hold most rules and what they ask for in a line each."""
_ELSEWHERE = ("experts", "knee_steps", "stages")
"""Lineage that is shown in another table, or too long to be."""


def print_versions(versions: Sequence[ModelVersion], metric: str) -> None:
    """Print every version with one metric of its evaluations."""
    table = _table("model", "version", "aliases", "protocol", *(row.replace("_", " ") for row in ROWS), right=(4, 5, 6))
    for version in versions:
        evaluation = version.evaluation
        tables = {} if evaluation is None else evaluation.tables
        for name in sorted(tables) or ["-"]:
            rows = tables[name].rows if name in tables else {}
            values = [_number(rows.get(row, {}).get(metric)) for row in ROWS]
            table.add_row(version.name, str(version.version), ", ".join(version.aliases), name, *values)
    table.caption = f"{metric}, means of each evaluation"
    output_console().print(table if versions else "no registered models")


def print_version(version: ModelVersion) -> None:
    """Print all that is known about a version."""
    console = output_console()
    aliases = f"  alias {', '.join(version.aliases)}" if version.aliases else ""
    created = datetime.fromtimestamp(version.created_s, UTC).isoformat(sep=" ", timespec="seconds")
    console.print(f"{version.label}{aliases}, registered {created}", style="bold")
    evaluation = version.evaluation
    for name, table in sorted({} if evaluation is None else evaluation.tables.items()):
        metrics = list(dict.fromkeys(metric for row in table.rows.values() for metric in row))
        shown_table = _table(f"under {name}", *metrics, right=range(1, len(metrics) + 1))
        for row, means in table.rows.items():
            shown_table.add_row(row.replace("_", " "), *(_number(means.get(metric)) for metric in metrics))
        count = f"{table.images} images of " if table.images else ""
        shown_table.caption = f"means over {count}test set {table.test_set[:HASH_SHOWN]}"
        console.print(shown_table)
    if evaluation is None:
        console.print("not evaluated yet")
    _print_experts(console, version)
    facts = _table("made from", "")
    for key, value in sorted(version.tags.items()):
        section, _, name = key.partition(".")
        if section in ("lineage", "bundle") and name not in _ELSEWHERE:
            facts.add_row(f"{section} {name.replace('_', ' ')}", value)
    facts.add_row("bundle digest", version.tags.get("bundle_digest", "-"))
    facts.add_row("run", version.run_id or "-")
    console.print(facts)


def print_comparison(first: ModelVersion, second: ModelVersion, found: Comparison) -> None:
    """Print what two versions differ in."""
    console = output_console()
    table = _table("metric", first.label, second.label, "difference", "95 % interval", "", right=(1, 2, 3))
    for one in found.metrics:
        table.add_row(f"{one.metric} ({one.row.replace('_', ' ')}, {one.protocol})", *_difference(one))
    table.caption = f"{second.label} minus {first.label}, paired over images"
    console.print(table if found.metrics else "neither was evaluated")
    same = [name for name, (ours, theirs) in found.experts.items() if ours == theirs]
    other = [name for name in found.experts if name not in same]
    console.print(f"experts: {', '.join(other) or 'none'} differ, {', '.join(same) or 'none'} the same")
    differs = _table("differs", first.label, second.label)
    for key, (ours, theirs) in found.lineage.items():
        differs.add_row(key.replace("_", " "), ours or "-", theirs or "-")
    console.print(differs if found.lineage else "boundaries, routing, data and lineage are the same")


def print_decision(version: ModelVersion, decision: PromotionDecision, whose: str) -> None:
    """Print every rule of the gate with both numbers."""
    console = output_console()
    if not decision.rules:
        console.print(decision.reason)
        return
    champion = "champion" if decision.champion_version is None else f"champion {decision.champion_version}"
    table = _table("rule", f"challenger {version.version}", champion, "difference", "", right=(1, 2))
    table.padding = (0, 2, 1, 0)
    table.columns[0].min_width = RULE_WIDTH
    for rule in decision.rules:
        table.add_row(*_rule(rule))
    table.caption = whose
    console.print(table)


def print_history(name: str, history: History) -> None:
    """Print every row of a history, oldest first."""
    table = _table("", "when, UTC", "who", "what", "from", "to", "numbers and reasons", right=(0,))
    for row in history.rows:
        what = Text(row.action if row.holds else f"{row.action}, too late", style="" if row.holds else "yellow")
        if row.forced:
            what.append(" by force", style="red")
        when = row.at.partition("+")[0].replace("T", " ")[:19]
        table.add_row(str(row.number), when, row.by, what, *_moved(row), _numbers(row))
    console = output_console()
    console.print(table if history.rows else f"{name} was never promoted")
    if history.champion is not None:
        console.print(f"champion: version {history.champion}")


def _print_experts(console: Console, version: ModelVersion) -> None:
    experts = experts_of(version)
    if not experts:
        return
    boundaries = json.loads(version.tags.get("bundle.boundaries", "[]"))
    edges = [1.0, *reversed(boundaries), 0.0]
    known = {stage for expert in experts for stage in expert.get("knees") or {}}
    stages = sorted(known, key=STAGE_NAMES.index)
    table = _table("expert", "noise levels", *(f"knee in {stage}" for stage in stages), "SHA-256", "from")
    for index, expert in enumerate(experts):
        levels = f"{edges[index]:.4g} to {edges[index + 1]:.4g}" if len(edges) == len(experts) + 1 else "-"
        knees = [_knee((expert.get("knees") or {}).get(stage)) for stage in stages]
        table.add_row(str(expert["name"]), levels, *knees, str(expert["sha256"])[:HASH_SHOWN], str(expert.get("from", "this run")))
    console.print(table)


def _knee(knee: dict[str, object] | None) -> str:
    if knee is None or knee["step"] is None:
        return "-"
    return f"{knee['step']}" if knee["confirmed"] else f"{knee['step']}, not confirmed"


def _rule(rule: RuleOutcome) -> tuple[Text, str, str, str, Text]:
    name = Text(rule.rule).append(f"\n{rule.asks}", style="dim")
    if rule.note:
        name.append(f"\n{rule.note}", style="yellow" if rule.passed else "red")
    difference = "" if rule.difference is None else f"{rule.difference:+.4g}"
    if rule.interval is not None:
        difference += f"\n[{rule.interval[0]:+.4g}, {rule.interval[1]:+.4g}]"
    verdict = Text("pass", style="green") if rule.passed else Text("FAIL", style="bold red")
    return name, shown(rule.challenger), shown(rule.champion), difference.replace("[", r"\["), verdict


def _difference(one: MetricDifference) -> tuple[str, str, str, str, Text]:
    numbers = (_number(one.first), _number(one.second))
    if one.paired is None:
        return *numbers, "-", "-", Text(one.note)
    verdict = Text("no difference", style="dim") if one.better is None else Text("better", "green") if one.better else Text("worse", "red")
    verdict.append(f"; {one.note}" if one.note else "", style="dim")
    return *numbers, f"{one.paired.mean:+.4g}", rf"\[{one.paired.low:+.4g}, {one.paired.high:+.4g}]", verdict


def _moved(row: HistoryRow) -> tuple[str, str]:
    return "-" if row.from_version is None else str(row.from_version), "-" if row.to_version is None else str(row.to_version)


def _numbers(row: HistoryRow) -> str:
    parts = [row.reason] if row.reason else []
    for rule in row.rules:
        numbers = shown(rule.challenger) if rule.champion is None else f"{shown(rule.challenger)} / {shown(rule.champion)}"
        parts.append(f"{'' if rule.passed else 'FAIL '}{rule.rule}: {numbers}")
    return "\n".join(parts).replace("[", r"\[")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"


def _table(*columns: str, right: Sequence[int] = ()) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0), caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in right else "left", overflow="fold")
    return table
