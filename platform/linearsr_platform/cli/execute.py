"""Runs a loaded recipe: puts together tracking, cluster and display, and says where to look at the end."""

from contextlib import ExitStack
from datetime import datetime
from importlib.metadata import version
from typing import TYPE_CHECKING

import typer

from linearsr_platform import storage
from linearsr_platform.cli.account import account_name
from linearsr_platform.cli.boundary import warn_of
from linearsr_platform.cli.environment import quiet_libraries
from linearsr_platform.cli.progress import RunDisplay, make_display
from linearsr_platform.recipe.identity import RunKind, recipe_identity
from linearsr_platform.recipe.load import LoadedRecipe
from linearsr_platform.recipe.recorded import record_recipe, require_same_recipe
from linearsr_platform.report.model import StageRecord

if TYPE_CHECKING:
    from linearsr_platform.stages.context import RunContext


SEARCH_RUN = "search-run.json"
"""File in a search's folder that names its MLflow run, and whether it has come to its end."""


def execute(loaded: LoadedRecipe, *, redo_from: str | None, update: bool, verbose: bool) -> None:
    """Run all stages, then write the report, also when a stage failed; `update` lets the recipe differ from the run's before."""
    quiet_libraries(verbose=verbose)
    bring_secrets_of(loaded)
    _check_identity(loaded, "run", update=update)
    from linearsr_platform.stages.pipeline import run_pipeline
    from linearsr_platform.stages.preflight import check_before_start
    from linearsr_platform.stages.report import write as write_run_report

    started = datetime.now().astimezone()
    check_before_start(loaded.recipe)
    warn_of(loaded.recipe)
    records: list[StageRecord] = []
    with ExitStack() as closing, make_display() as display:
        context = open_context(loaded, display, closing, verbose=verbose)
        with context.pipeline_run:
            record_recipe(context.run_url, loaded, "run", version("linearsr"))
            try:
                run_pipeline(context, redo_from=redo_from, records=records)
            finally:
                # A failed run has a report too: it says what was done before, and what failed.
                display.message(f"report    {write_run_report(context, records, started)}")
    _say_where_to_look(context)


def execute_search(loaded: LoadedRecipe, *, redo_from: str | None, update: bool, verbose: bool) -> None:
    """Run all stages of a search, write its report and show the ranking. An interrupted one goes on in its MLflow run if that is there."""
    quiet_libraries(verbose=verbose)
    bring_secrets_of(loaded)
    _check_identity(loaded, "search", update=update)
    from linearsr_platform.cli.search_table import print_search
    from linearsr_platform.stages.preflight import check_before_start
    from linearsr_platform.stages.search import run_search, write

    started = datetime.now().astimezone()
    check_before_start(loaded.recipe)
    with ExitStack() as closing, make_display() as display:
        record = storage.join(storage.absolute(loaded.recipe.storage), loaded.recipe.name, SEARCH_RUN)
        context = open_context(loaded, display, closing, verbose=verbose, run_id=_interrupted_run(record), kind="search")
        storage.write_json(record, {"run_id": context.pipeline_run.run_id, "finished": False})
        with context.pipeline_run:
            record_recipe(context.run_url, loaded, "search", version("linearsr"))
            run_search(context, redo_from=redo_from, records=[])
            report = write(context, started=started, seconds=(datetime.now().astimezone() - started).total_seconds())
        storage.write_json(record, {"run_id": context.pipeline_run.run_id, "finished": True})
    print_search(report)
    from linearsr_platform.tracking.store import how_to_open

    for label, value in (
        ("report", storage.join(context.run_url, "search.html")),
        ("use it", f"linearsr run RECIPE --set experts.boundaries=from:{loaded.recipe.name} --update"),
        ("MLflow", how_to_open(context.tracker.uri)),
    ):
        typer.echo(f"{label:<9} {value}")


def _check_identity(loaded: LoadedRecipe, kind: RunKind, *, update: bool) -> None:
    if not update:
        require_same_recipe(storage.join(storage.absolute(loaded.recipe.storage), loaded.recipe.name), loaded, kind)


def bring_secrets_of(loaded: LoadedRecipe) -> None:
    """Set the variables that storage and tracking need, before either is asked."""
    if loaded.recipe.cluster.secrets:
        from linearsr_platform.cluster.session import bring_secrets

        bring_secrets(loaded.recipe.cluster.secrets)


def _interrupted_run(record: str) -> str | None:
    """Return the MLflow run of a search that did not come to its end, by the file that it keeps; None if there is none."""
    value = storage.read_json(record) if storage.exists(record) else None
    return str(value["run_id"]) if isinstance(value, dict) and not value["finished"] else None


def open_context(
    loaded: LoadedRecipe,
    display: RunDisplay,
    closing: ExitStack,
    *,
    verbose: bool,
    run_id: str | None = None,
    kind: RunKind = "run",
) -> "RunContext":
    """Connect tracking and prepare, without starting it, the cluster; `run_id` is a run to go on with if it is there."""
    from linearsr_platform.cluster.session import cluster_session
    from linearsr_platform.cluster.sight import require_shared_files
    from linearsr_platform.stages.context import RunContext
    from linearsr_platform.tracking.journal import outbox_folder
    from linearsr_platform.tracking.runs import Tracker
    from linearsr_platform.tracking.store import default_artifact_root, default_uri, without_password

    recipe = loaded.recipe
    root = storage.absolute(recipe.storage)
    tracker = closing.enter_context(
        Tracker(
            recipe.tracking.uri or default_uri(root),
            recipe.tracking.experiment or recipe.name,
            artifact_root=default_artifact_root(root),
            journals=outbox_folder(root, recipe.name),
            tell=display.message,
        )
    )
    pipeline_run = None if run_id is None else tracker.resume(run_id)
    if pipeline_run is None:
        if run_id is not None:
            # Deleted, or in the store of another tracking.uri.
            display.message(f"MLflow at {without_password(tracker.uri)} has no run {run_id} any more; going on in a new one")
        identity = {"recipe_hash": loaded.hash, "recipe_identity": recipe_identity(loaded.resolved, kind), "run_kind": kind}
        tags = {**identity, "code_version": version("linearsr"), "folder": storage.join(root, recipe.name)}
        pipeline_run = tracker.start_pipeline(recipe.name, tags=tags, params=loaded.resolved)
    pipeline_run.log_dict(loaded.resolved, "recipe.json")
    opened = False

    def open_cluster() -> None:
        nonlocal opened
        if not opened:
            closing.enter_context(cluster_session(recipe.cluster, verbose=verbose))
            require_shared_files(recipe)
        opened = True

    return RunContext(
        loaded=loaded,
        storage_url=root,
        tracker=tracker,
        pipeline_run=pipeline_run,
        display=display,
        user=account_name(),
        open_cluster=open_cluster,
    )


def _say_where_to_look(context: "RunContext") -> None:
    from linearsr_platform.tracking.store import how_to_open

    for label, value in (
        ("pictures", storage.join(context.run_url, "pictures")),
        ("model", f"models:/{context.recipe.model_name}@champion"),
        ("MLflow", how_to_open(context.tracker.uri)),
    ):
        typer.echo(f"{label:<9} {value}")
