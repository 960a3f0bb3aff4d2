"""`linearsr check`: say whether a recipe is right, and what it would run."""

import typer

from linearsr_platform.cli.boundary import warn_of
from linearsr_platform.cli.options import Overrides, Profile, RecipePath, Verbose


def check(
    recipe: RecipePath,
    profile: Profile = None,
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Check a recipe without running it: every error at once, or a summary of the run."""
    from linearsr.codec_source import check_codec
    from linearsr.degradation_config import changed_keys
    from linearsr.opencv import check_installed
    from linearsr_platform import storage
    from linearsr_platform.recipe.load import load_recipe
    from linearsr_platform.recipe.schema import STAGE_NAMES, TRAINING_STAGES

    loaded = load_recipe(recipe, profile, overrides or ())
    degradation = loaded.recipe.degradation
    check_codec(loaded.recipe.model.codec)
    check_installed(degradation)
    rows = {"name": loaded.recipe.name, "hash": loaded.hash, "stages": " > ".join(STAGE_NAMES)}
    for where in TRAINING_STAGES:
        stage = loaded.recipe.training_stage(where)
        budget = f"at most {stage.max_steps} steps" + (f" or {stage.max_seconds:g} s" if stage.max_seconds else "")
        rows[where] = f"{budget}, {stage.workers} worker{'s' if stage.workers > 1 else ''}, ZeRO {stage.zero.stage}"
    search = loaded.recipe.search
    if search is not None:
        experts = " or ".join(map(str, search.experts))
        rows["search"] = (
            f"{search.trials} trials of {experts} experts, rungs of {', '.join(map(str, search.rungs))} steps, by {search.metric}"
        )
    changed = ", ".join(changed_keys(degradation))
    rows["degradation"] = degradation.preset + (f", with other {changed}" if changed else "")
    rows["model"] = loaded.recipe.model_name
    rows["results"] = storage.absolute(loaded.recipe.storage)
    typer.echo(f"{recipe} is valid")
    for name, value in rows.items():
        typer.echo(f"  {name:<15} {value}")
    warn_of(loaded.recipe)
