"""`linearsr doctor resume`: does a recipe keep its promises on these machines. `cli/offline.py` has `linearsr doctor --offline`."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from random import Random
from typing import TYPE_CHECKING, Annotated

import typer

from linearsr_platform.cli.options import Overrides, Profile, RecipePath, Verbose
from linearsr_platform.errors import StageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from linearsr_platform.recipe.load import LoadedRecipe
    from linearsr_platform.stages.resume_check import OtherWorkers, ResumeCheck, Row


def resume(
    recipe: RecipePath,
    profile: Profile = None,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(metavar="N", help="Steps of each training.")] = 12,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Also go on with this number of workers.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the result as JSON; progress goes to standard error.")] = False,
    verbose: Verbose = False,
) -> None:
    """Train a few steps twice, kill a worker in one, and compare what both end with, bit for bit; exit with 1 if it differs."""
    from linearsr_platform.cli.environment import quiet_libraries
    from linearsr_platform.recipe.load import load_recipe

    quiet_libraries(verbose=verbose)
    show_and_exit(_check(load_recipe(recipe, profile, overrides or []), steps, workers, as_json=as_json, verbose=verbose), as_json=as_json)


def show_and_exit(found: "ResumeCheck", *, as_json: bool) -> None:
    """Print what a check came to, and exit with 1 if anything differs."""
    if as_json:
        typer.echo(json.dumps({**asdict(found), "equal": found.equal}, indent=2))
    else:
        _show(found)
    if not found.equal:
        raise typer.Exit(StageError.exit_code)


DOCTOR: dict[str, Callable[..., None]] = {"resume": resume}
"""The verbs of `linearsr doctor`."""


def _check(loaded: "LoadedRecipe", steps: int, workers: int | None, *, as_json: bool, verbose: bool) -> "ResumeCheck":
    from linearsr_platform import storage
    from linearsr_platform.cli.execute import bring_secrets_of
    from linearsr_platform.cli.progress import display_beside_result
    from linearsr_platform.cluster.session import cluster_session
    from linearsr_platform.cluster.sight import require_shared_files
    from linearsr_platform.stages.context import RecipeContext
    from linearsr_platform.stages.doctor import check_recipe_resume

    bring_secrets_of(loaded)

    def open_cluster() -> None:
        closing.enter_context(cluster_session(loaded.recipe.cluster, verbose=verbose))
        require_shared_files(loaded.recipe)

    with display_beside_result(as_json=as_json) as display, ExitStack() as closing:
        context = RecipeContext(
            loaded=loaded,
            storage_url=storage.absolute(loaded.recipe.storage),
            display=display,
            open_cluster=_Once(open_cluster),
        )
        return check_recipe_resume(context, steps=steps, other_workers=workers, chance=Random())  # noqa: S311 (no secret)


class _Once:
    """Calls a function at its own first call."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action: Callable[[], None] | None = action

    def __call__(self) -> None:
        action, self._action = self._action, None
        if action is not None:
            action()


def _show(found: "ResumeCheck") -> None:
    from linearsr_platform.cli.search_table import output_console

    console = output_console()
    worker, step = found.killed
    killed = f"worker {worker} was killed in step {step}, training went on from step {found.resumed_at}"
    console.print(f"{found.steps} steps on {_workers(found.workers)}; {killed}", soft_wrap=True)
    _show_rows(console, found.rows, "interrupted")
    if found.other is not None:
        _show_other(console, found.other)
    different = sum(not row.equal for row in (*found.rows, *(found.other.rows if found.other else ())))
    console.print(f"NOT EQUAL: {different} of these differ" if different else "all equal: an interruption costs time and nothing else")


def _show_rows(console: "Console", rows: "Sequence[Row]", resumed: str) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("", "undisturbed", resumed, "", box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for row in rows:
        since = "" if row.first_step is None else f", from step {row.first_step}"
        verdict = Text("equal", style="green") if row.equal else Text(f"NOT EQUAL{since}", style="bold red")
        table.add_row(row.what, row.undisturbed, row.resumed, verdict)
    console.print()
    console.print(table)
    console.print()


def _show_other(console: "Console", other: "OtherWorkers") -> None:
    console.print(
        f"and from step {other.resumed_at} of the undisturbed one on {_workers(other.workers)}",
        soft_wrap=True,
    )
    _show_rows(console, other.rows, f"on {other.workers}")
    console.print(
        f"apart: weights {other.weights_apart:.2g}, averaged weights {other.average_apart:.2g} of their norm, loss {other.loss_apart:.2g} "
        "at most. Workers draw noise of their own, so with another number of them training has other luck.\n",
        soft_wrap=True,
    )


def _workers(count: int) -> str:
    return f"{count} worker{'s' if count > 1 else ''}"
