"""`linearsr run`: a whole recipe, from photographs to a released model."""

from typing import Annotated

import typer

from linearsr_platform.cli.options import Overrides, Profile, RecipePath, Update, Verbose, known_stage
from linearsr_platform.recipe.schema import STAGE_NAMES


def run(
    recipe: RecipePath,
    profile: Profile = None,
    overrides: Overrides = None,
    redo_from: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help=f"Do this stage and all after it again: {', '.join(STAGE_NAMES)}.")
    ] = None,
    update: Update = False,
    verbose: Verbose = False,
) -> None:
    """Run a recipe: prepare, pretrain, experts, finetune, assemble, evaluate, register, promote. Finished stages are skipped."""
    from linearsr_platform.recipe.load import load_recipe

    loaded = load_recipe(recipe, profile, overrides or [])
    from_stage = known_stage(redo_from, STAGE_NAMES)
    from linearsr_platform.cli.execute import execute

    execute(loaded, redo_from=from_stage, update=update, verbose=verbose)
