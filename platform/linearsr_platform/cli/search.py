"""`linearsr search`: the expert boundaries that score best, found with Ray Tune from computed proposals."""

from typing import Annotated

import typer

from linearsr_platform.cli.options import Overrides, Profile, RecipePath, Update, Verbose, known_stage
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.schema import SEARCH_STAGE_NAMES


def search(
    recipe: RecipePath,
    profile: Profile = None,
    overrides: Overrides = None,
    redo_from: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help=f"Do this stage and all after it again: {', '.join(SEARCH_STAGE_NAMES)}.")
    ] = None,
    update: Update = False,
    verbose: Verbose = False,
) -> None:
    """Search the expert boundaries of a recipe with a `search` section. Finished trials are kept; a killed search goes on."""
    from linearsr_platform.recipe.load import load_recipe

    loaded = load_recipe(recipe, profile, overrides or [])
    if loaded.recipe.search is None:
        raise UserError(f"search: got {recipe}, which has no such section; expected one; fix: see pipelines/search_boundaries.yaml")
    from_stage = known_stage(redo_from, SEARCH_STAGE_NAMES)
    from linearsr_platform.cli.execute import execute_search

    execute_search(loaded, redo_from=from_stage, update=update, verbose=verbose)
