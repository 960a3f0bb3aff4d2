"""Evaluations in a terminal: metrics down, protocols across, each value with its interval."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from linearsr.metric_table import METRICS
from linearsr_platform.cli.search_table import output_console
from linearsr_platform.registry.evaluation import ProtocolTable
from linearsr_platform.stages.choosing import by_reason

HASH_SHOWN = 12
ONE_LINE = 25
"""Columns of a protocol that hold value and interval beside each other."""
LABEL = 16
"""Columns of the metrics' names."""
ORDER = ("restored", "one_step", "routed", "bicubic")


def print_tables(tables: Mapping[str, ProtocolTable], left_out: Mapping[str, str]) -> None:
    """Print every protocol's numbers side by side, what was left out and why, and the hashes of weights."""
    console = output_console()
    console.print(_numbers(tables, console))
    first = next(iter(tables.values()))
    tags = f"; tags {first.protocol['tags']}" if "tags" in first.protocol else ""
    console.print(f"{first.images} images, means with 95 % intervals; test set {first.test_set[:HASH_SHOWN]}{tags}")
    hashes = {metric: digest for table in tables.values() for metric, digest in _weights(table).items() if digest != "none"}
    if hashes:
        console.print(f"weights: {', '.join(f'{metric} {digest[:HASH_SHOWN]}' for metric, digest in hashes.items())}")
    for reason, metrics in by_reason(left_out).items():
        console.print(Text(f"left out {', '.join(metrics)}: {reason}", style="yellow"))


def _numbers(tables: Mapping[str, ProtocolTable], console: Console) -> Table:
    wide = console.width >= LABEL + ONE_LINE * len(tables)
    shown = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column("", min_width=LABEL - 2)
    for name in tables:
        shown.add_column(name, justify="right")
    rows = [row for row in ORDER if any(row in table.rows for table in tables.values())]
    for place, row in enumerate(rows):
        if len(rows) > 1:
            shown.add_row(Text(row.replace("_", " "), style="bold"))
        metrics = sorted({metric for table in tables.values() for metric in table.rows[row]}, key=list(METRICS).index)
        for metric in metrics:
            shown.add_row(_label(metric), *(_cell(table, row, metric, wide=wide) for table in tables.values()))
        if place < len(rows) - 1:
            shown.add_row("")
    return shown


def _label(metric: str) -> Text:
    return Text(f"{metric} {'↑' if METRICS[metric].higher_is_better else '↓'}")


def _cell(table: ProtocolTable, row: str, metric: str, *, wide: bool) -> Text:
    value, ends = table.rows[row].get(metric), table.intervals.get(row, {}).get(metric)
    if value is None:
        return Text("-", style="dim")
    cell = Text(_number(value))
    if ends is not None:
        cell.append(f"{' ' if wide else chr(10)}[{_number(ends[0])}, {_number(ends[1])}]", style="dim")
    return cell


def _weights(table: ProtocolTable) -> Mapping[str, str]:
    found = table.protocol.get("weights")
    return found if isinstance(found, dict) else {}


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"
