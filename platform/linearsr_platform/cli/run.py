"""`linearsr run`: a whole recipe, from photographs to a released model."""

import difflib
from typing import Annotated

import typer

from linearsr_platform.cli.options import Overrides, Profile, RecipePath, Verbose
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.schema import STAGE_NAMES


def run(
    recipe: RecipePath,
    profile: Profile = None,
    overrides: Overrides = None,
    redo_from: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help=f"Do this stage and all after it again: {', '.join(STAGE_NAMES)}.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Run a recipe: prepare, pretrain, experts, finetune, assemble, evaluate, register, promote. Finished stages are skipped."""
    from linearsr_platform.recipe.load import load_recipe

    loaded = load_recipe(recipe, profile, overrides or [])
    if redo_from is not None and redo_from not in STAGE_NAMES:
        near = difflib.get_close_matches(redo_from, STAGE_NAMES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"--from: got {redo_from!r}; expected one of {', '.join(STAGE_NAMES)}{hint}")
    from linearsr_platform.cli.execute import execute

    execute(loaded, redo_from=redo_from, verbose=verbose)
