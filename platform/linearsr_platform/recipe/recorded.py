"""The recipe that a run's folder was started with, kept there; another one under the same name is refused with what changed."""

import json
from collections.abc import Mapping

from pydantic import ValidationError

from linearsr_platform import storage
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.identity import RunKind, changes, describe_changes, recipe_identity
from linearsr_platform.recipe.load import LoadedRecipe
from linearsr_platform.recipe.schema import Recipe

FILES: dict[RunKind, str] = {"run": "recipe.json", "search": "search-recipe.json"}
"""A run and a search of one name share a folder, and each has its own recipe."""


def require_same_recipe(run_url: str, loaded: LoadedRecipe, kind: RunKind) -> None:
    """Refuse a recipe with the name of a run that was started with other settings; a folder without a record takes any.

    Raises:
        UserError: with every setting that changed and the ways out.
    """
    record = _read(run_url, kind)
    if record is None:
        return
    found = changes(record, loaded.resolved, kind)
    if found:
        raise UserError(
            f"name: got {loaded.recipe.name!r}, and {run_url} holds a {kind} of another recipe; expected the same settings, but "
            f"{len(found)} changed (was -> now):\n{describe_changes(found)}\n"
            "fix: --set name=OTHER to keep both, or --update to go on under this name (stages that a change concerns, and those that need "
            f"them, run again, the others are reused), or delete {run_url}"
        )


def record_recipe(run_url: str, loaded: LoadedRecipe, kind: RunKind, code_version: str) -> None:
    """Write the recipe into a run's folder, unless the same one is there: what it was started with stays."""
    record = _read(run_url, kind)
    if record is not None and not changes(record, loaded.resolved, kind):
        return
    content = {"kind": kind, "identity": recipe_identity(loaded.resolved, kind), "hash": loaded.hash, "code_version": code_version}
    storage.write_json(storage.join(run_url, FILES[kind]), {**content, "recipe": loaded.resolved})


def _read(run_url: str, kind: RunKind) -> Mapping[str, object] | None:
    """Return the recorded settings; None if there are none, or in the form of versions that kept no identity."""
    file = storage.join(run_url, FILES[kind])
    value = storage.read_json(file) if storage.exists(file) else None
    recipe = value.get("recipe") if isinstance(value, dict) else None
    return _completed(recipe) if isinstance(recipe, dict) else None


def _completed(recipe: dict[str, object]) -> Mapping[str, object]:
    """Give settings that are younger than a record their defaults, which is what the run had; leave one that is no recipe now as it is."""
    try:
        return Recipe.model_validate_json(json.dumps(recipe)).model_dump(mode="json")
    except ValidationError:
        return recipe
