"""The pipeline of a search over boundaries, and what it leaves: report, pictures, ranking, and the best boundaries for a recipe."""

from dataclasses import replace
from datetime import datetime
from tempfile import TemporaryDirectory

from linearsr.metric_table import metric_spec
from linearsr_platform import storage
from linearsr_platform.cluster.capacity import require_room, trials_at_once
from linearsr_platform.cluster.experts import room_now
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.load import BOUNDARIES_FILE
from linearsr_platform.report.model import StageRecord
from linearsr_platform.report.search_model import SearchReport
from linearsr_platform.report.search_page import render_search
from linearsr_platform.report.search_plots import plot_axis, plot_profile
from linearsr_platform.stages import finalists, prepare, pretrain, profile, trials
from linearsr_platform.stages.context import RunContext, Stage, StageResult
from linearsr_platform.stages.finalists import comparisons_of
from linearsr_platform.stages.pipeline import run_stages, stage_key, stage_url
from linearsr_platform.stages.profile import profile_of, section_of, trial_share
from linearsr_platform.stages.trials import best_of, ledger_of, proposals_of, start_of

STAGES: dict[str, Stage] = {
    "prepare": Stage((), prepare.settings, prepare.run, remark=prepare.remark),
    "pretrain": Stage(("prepare",), pretrain.settings, pretrain.run),
    "profile": Stage(("prepare", "pretrain"), profile.settings, profile.run),
    "trials": Stage(("prepare", "pretrain"), trials.settings, trials.run, trials.suffices),
    "finalists": Stage(("prepare", "pretrain", "trials"), finalists.settings, finalists.run),
}
"""Every stage of a search, in order."""
PARENT_STAGES = ("prepare", "pretrain")
"""Stages that may be taken from another run."""


def run_search(context: RunContext, *, redo_from: str | None, records: list[StageRecord]) -> None:
    """Run every stage of a search that is not done, in order.

    Raises:
        UserError: if the recipe has no search, the parent that it names lacks a network of these settings, or no machine has
            room for it.
    """
    section = section_of(context)
    if section.parent is not None:
        _adopt(context, section.parent)
    left = {name: stage for name, stage in STAGES.items() if name not in context.results}
    if redo_from is not None and redo_from not in left:
        raise UserError(
            f"--from: got {redo_from!r}; expected one of {', '.join(left)}, because search.parent has the others; fix: run {section.parent}"
        )
    run_stages(context, left, redo_from=redo_from, records=records, before_work=lambda: check_room(context))


def check_room(context: RunContext) -> None:
    """Refuse a search that could never be scheduled, before anything is prepared or trained for it.

    Raises:
        UserError: with the arithmetic, if a trial or a trainer needs more than a local cluster has.
    """
    recipe, share = context.recipe, trial_share(context)
    room = room_now()
    # A running cluster may grow, so there trials and trainers wait; see `fit_all`.
    if recipe.cluster.address is None:
        trials_at_once(share, room, wanted=None)
        if "pretrain" not in context.results:
            require_room({"pretrain": recipe.pretrain.least_workers}, replace(share, memory_bytes=0.0), room)
        # Finalists have one worker each, with the share of an expert's worker.
        require_room({"finalists": 1}, replace(share, cpus=recipe.experts.cpus_per_worker or share.cpus), room)


def _adopt(context: RunContext, parent: str) -> None:
    """Take the first stages' results from another run under the same storage."""
    run_url = storage.join(context.storage_url, parent)
    for name in PARENT_STAGES:
        url = stage_url(run_url, name, stage_key(context, name, STAGES[name]))
        found = StageResult.read(url)
        if found is None:
            raise UserError(
                f"search.parent: got {parent!r}; expected a run with this recipe's data, degradation, model and pretrain settings, but its "
                f"{name} is not at {url}; fix: run it first, or leave search.parent out to pre-train here"
            )
        context.results[name] = found
        context.display.stage_skipped(name, f"from run {parent}: {found.summary}")


def write(context: RunContext, *, started: datetime, seconds: float) -> SearchReport:
    """Write `search.html`, `search.json`, pictures and `boundaries.yaml` into the search's folder, and keep them in MLflow.

    Args:
        context: with the results of all stages.
        started: when the search began.
        seconds: how long this invocation took.
    """
    report = gather(context, started=started, seconds=seconds)
    pictures: dict[str, bytes] = {}
    with TemporaryDirectory(prefix="linearsr-search-") as folder:
        plot_axis(report, storage.join(folder, "axis.png"))
        plot_profile(profile_of(context), report.proposals, storage.join(folder, "profile.png"))
        for name in ("axis", "profile"):
            pictures[name] = storage.read_bytes(storage.join(folder, f"{name}.png"))
            storage.write_bytes(storage.join(context.run_url, f"{name}.png"), pictures[name])
    html, fragment = render_search(report, pictures), boundaries_fragment(report)
    storage.write_json(storage.join(context.run_url, "search.json"), report.to_json())
    storage.write_text(storage.join(context.run_url, "search.html"), html)
    storage.write_text(storage.join(context.run_url, BOUNDARIES_FILE), fragment)
    for name in ("axis.png", "profile.png", "search.json", "search.html", BOUNDARIES_FILE):
        # One by one: the folder also holds every trained expert.
        with storage.local_path(storage.join(context.run_url, name)) as file:
            context.pipeline_run.log_artifact(file)
    return report


def gather(context: RunContext, *, started: datetime, seconds: float) -> SearchReport:
    """Collect everything in the report but the pictures."""
    section = section_of(context)
    rows, higher = ledger_of(context).rows(section.rungs, {}), metric_spec(section.metric).higher_is_better
    return SearchReport(
        name=context.recipe.name,
        metric=section.metric,
        higher_is_better=higher,
        trials=tuple(rows),
        proposals=tuple(proposals_of(context)),
        comparisons=comparisons_of(context.results["finalists"].data),
        best=best_of(rows, higher_is_better=higher),
        profile=profile_of(context),
        trained=sum(row.trained for row in rows),
        cached=sum(row.cached for row in rows),
        seconds=seconds,
        started=started.isoformat(timespec="seconds"),
        start=start_of(context),
    )


def boundaries_fragment(report: SearchReport) -> str:
    """Return the YAML that a recipe or a profile needs to use what was found, with what is known about it as comments."""
    best, first = report.winner, report.comparisons[0]
    assert best is not None  # noqa: S101 (a finished search has compared)
    lines = [f"# Found by the search {report.name}, {report.started}: {best.label}, {report.metric} {best.score:.6g}, {best.seeds} seeds."]
    for one in report.comparisons[1:]:
        if one.difference is not None and one.interval is not None:
            ends = f"{one.interval[0]:+.3g} to {one.interval[1]:+.3g}"
            lines.append(f"# {one.label} against {first.label}: {one.difference:+.3g}, 95 % interval {ends}: {one.verdict}.")
    lines += ["experts:", f"  boundaries: [{', '.join(f'{t:.6f}' for t in best.boundaries)}]", ""]
    return "\n".join(lines)
