"""`linearsr knee`: when a training run should have stopped, from its curves."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from linearsr_platform.cli.models import Storage, TrackingUri
from linearsr_platform.cli.options import Verbose
from linearsr_platform.errors import UserError

if TYPE_CHECKING:
    from linearsr.curves import Curves
    from linearsr.knee import KneeDecision

HEADLINES = {
    "improving": "Still improving: no knee yet",
    "plateau": "On a plateau: nothing has got worse yet",
    "confirmed": "Knee confirmed",
    "diverging": "Diverging: go back to the knee",
}
"""What each state of the detector means to a user."""
VALIDATION = "validation/"
"""What the names of validation metrics begin with in MLflow."""

CurvesPath = Annotated[
    str | None, typer.Argument(metavar="CURVES.csv", help="A column `step` and one for each metric.", show_default=False)
]
MetricDeclarations = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        metavar="NAME:higher|lower",
        help="Use this metric; may be repeated, then only those named are used. NAME alone if its orientation is known.",
        show_default=False,
    ),
]
Run = Annotated[str | None, typer.Option(metavar="ID", help="Read an MLflow run instead of a file.", show_default=False)]


@dataclass(frozen=True, slots=True)
class Replay:
    """A detector's answer to curves."""

    online: "list[tuple[int, KneeDecision]]"
    """Step and decision after each evaluation, as training would have seen it."""
    final: "KneeDecision"
    last_step: int

    @property
    def saved_fraction(self) -> float:
        """Share of the steps that came after the knee was certain."""
        at = self.final.confirmed_at
        return round(1 - at / self.last_step, 4) if at is not None and self.last_step else 0.0


def knee(
    curves: CurvesPath = None,
    metric: MetricDeclarations = None,
    run: Run = None,
    online: Annotated[bool, typer.Option("--online", help="Show what would have been said after each evaluation.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object.")] = False,
    plot: Annotated[str | None, typer.Option(metavar="OUT.png", help="Draw the curves and the knee.", show_default=False)] = None,
    storage: Storage = "runs",
    tracking_uri: TrackingUri = None,
    verbose: Verbose = False,
) -> None:
    """Find the knee of training curves: the last checkpoint worth keeping before they oscillate, decline or diverge."""
    from linearsr.curves import parse_declarations
    from linearsr_platform.cli.environment import quiet_libraries

    if (curves is None) == (run is None):
        raise UserError("knee: got " + ("both" if run else "neither") + "; expected CURVES.csv or --run ID; fix: give one of them")
    if plot is not None and not plot.lower().endswith(".png"):
        raise UserError(f"--plot: got {plot!r}; expected a name that ends in .png; fix: --plot knee.png")
    quiet_libraries(verbose=verbose)
    try:
        declared = parse_declarations(metric or ())
        found = _read_file(str(curves), declared) if run is None else _read_run(run, declared, storage, tracking_uri)
    except ValueError as error:
        raise UserError(str(error)) from error
    replay = _replay(found)
    if plot is not None:
        from linearsr_platform.report.knee_plot import plot_knee

        plot_knee(found.points, found.orientations, replay.final, plot)
    if as_json:
        typer.echo(json.dumps(_as_json(replay, found.orientations, online=online), allow_nan=False))
    else:
        _tell(replay, found, str(curves or run), online=online)


def _read_file(path: str, declared: Mapping[str, bool]) -> "Curves":
    from linearsr.curves import parse_csv
    from linearsr_platform import storage

    try:
        text = storage.read_text(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; expected a CSV with a column `step`; fix: check the path") from error
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{path}: got {error.strerror}; expected a CSV that can be read; fix: check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: got bytes that are not UTF-8; expected a CSV as text; fix: save it as UTF-8") from error
    return parse_csv(text, storage.name_of(path), declared)


def _read_run(run_id: str, declared: Mapping[str, bool], storage_root: str, tracking_uri: str | None) -> "Curves":
    """Read the validation metrics of a run; with declared ones, any of its metrics."""
    from linearsr.curves import checked_curves, choose_metrics
    from linearsr_platform.cli.store import existing_store
    from linearsr_platform.tracking.histories import child_runs, metric_histories, metric_names

    client = existing_store(storage_root, tracking_uri)
    where, names = f"run {run_id}", metric_names(client, run_id)
    validation = [name for name in names if name.startswith(VALIDATION)]
    if not (names if declared else validation):
        nested = ", ".join(f"{name} {child}" for child, name in child_runs(client, run_id).items())
        fix = f"take one of the runs nested in it: {nested}" if nested else "name those to use with --metric"
        raise UserError(f"{where}: got no metric {VALIDATION}...; expected the run of a trainer; fix: {fix}")
    # A metric of the same name that is not of validation must not make a short name ambiguous.
    available = validation if all(_is_among(name, validation) for name in declared) else names
    orientations = choose_metrics(available, declared, where)
    return checked_curves(metric_histories(client, run_id, list(orientations)), orientations, where)


def _is_among(name: str, available: list[str]) -> bool:
    return name in available or VALIDATION + name in available


def _replay(curves: "Curves") -> Replay:
    from linearsr.knee import KneeDetector

    detector = KneeDetector(curves.orientations)
    online = [(step, detector.update(step, values)) for step, values in curves.points]
    return Replay(online, detector.conclude(), curves.points[-1][0])


def _as_json(replay: Replay, orientations: Mapping[str, bool], *, online: bool) -> dict[str, object]:
    final = replay.final
    answer: dict[str, object] = {
        "knee_step": final.knee_step,
        "confirmed_at": final.confirmed_at,
        "state": final.state,
        "interval": None if final.interval is None else list(final.interval),
        "onset_step": final.onset_step,
        "metrics": {
            name: {
                "higher_is_better": orientations[name],
                "state": verdict.state,
                "best_step": verdict.best_step,
                "onset_step": verdict.onset_step,
            }
            for name, verdict in final.metrics.items()
        },
        "saved_fraction": replay.saved_fraction,
        "reason": final.reason,
    }
    if online:
        answer["decisions"] = [
            {"step": step, "state": seen.state, "knee_step": seen.knee_step, "confirmed_at": seen.confirmed_at, "reason": seen.reason}
            for step, seen in replay.online
        ]
    return answer


def _tell(replay: Replay, curves: "Curves", name: str, *, online: bool) -> None:
    """Write the answer for people."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console(highlight=False)
    if online:
        for step, seen in replay.online:
            line = f"{step:>{len(str(replay.last_step))}}  {seen.state:<9}  {_or_dash(seen.knee_step)}"
            certain = "  <- certain, training would end here" if step == seen.confirmed_at else ""
            console.print(Text(line + certain, style="bold" if certain else ""), soft_wrap=True)
        console.print()
    first, last, final = curves.points[0][0], curves.points[-1][0], replay.final
    count = len(curves.orientations)
    console.print(
        Text(f"{name}: {len(curves.points)} evaluations of {count} metric{'s' if count > 1 else ''}, steps {first} to {last}"),
        soft_wrap=True,
    )
    console.print(Text(f"\n{HEADLINES[final.state]}", style="bold"))
    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for what, value in _facts(replay).items():
        facts.add_row(what, value)
    if facts.row_count:
        console.print(facts)
    columns = (Column("metric"), "better", "state", Column("best step", justify="right"), Column("onset", justify="right"))
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for metric, verdict in final.metrics.items():
        better = "higher" if curves.orientations[metric] else "lower"
        table.add_row(Text(metric), better, verdict.state, _or_dash(verdict.best_step), _or_dash(verdict.onset_step))
    console.print()
    console.print(table)
    console.print(Text(f"\n{final.reason}"), soft_wrap=True)


def _facts(replay: Replay) -> dict[str, str]:
    """Return what is known about the knee, in the order in which it is asked for."""
    final, facts = replay.final, {}
    if final.knee_step is not None:
        within = "" if final.interval is None else f", 90 % interval {final.interval[0]} to {final.interval[1]}"
        facts["knee" if final.confirmed_at is not None else "candidate"] = f"step {final.knee_step}{within}"
    if final.confirmed_at is not None:
        facts["certain at"] = f"step {final.confirmed_at}"
    if final.onset_step is not None:
        facts["onset"] = f"step {final.onset_step}, the last evaluation before anything got worse"
    if final.confirmed_at is not None:
        facts["saved"] = f"{replay.saved_fraction:.0%} of {replay.last_step} steps, had training ended when it was certain"
    return facts


def _or_dash(step: int | None) -> str:
    return "-" if step is None else str(step)
