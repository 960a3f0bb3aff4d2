"""Reads a recipe: YAML file, then a profile on top, then `--set` overrides, then everything is checked at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from linearsr_platform import storage
from linearsr_platform.errors import RecipeErrors, RecipeProblem
from linearsr_platform.recipe.document import parse_document
from linearsr_platform.recipe.identity import stable_hash
from linearsr_platform.recipe.merge import Layer, Merged, override_layers
from linearsr_platform.recipe.schema import Recipe
from linearsr_platform.recipe.validate import validate


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe that passed every check."""

    recipe: Recipe
    folder: str
    """Folder of the recipe file, absolute path or URL; tables of the data sources are relative to it."""
    resolved: dict[str, object]
    """Every setting with its default filled in, JSON-able."""
    hash: str
    """`stable_hash` of `resolved`."""


def load_recipe(path: str, profile: str | None = None, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read, merge and check a recipe.

    Args:
        path: the recipe, a YAML file or its URL.
        profile: settings of the place it runs at, merged over the recipe.
        overrides: `a.b=c` texts, merged over both in order; `c` is YAML.

    Raises:
        RecipeErrors: with everything that is wrong in any of them.
    """
    layers, problems = _layers(path, profile, overrides)
    if not layers:
        raise RecipeErrors(problems)
    merged = Merged()
    for layer in layers:
        merged.add(layer)
    _expand_sources(merged.settings)
    recipe, broken = validate(merged)
    # A value that could not be read is no value of its key's type either; once is enough.
    unread = {problem.key for problem in problems if problem.value}
    problems += [problem for problem in broken if problem.key not in unread]
    if problems:
        raise RecipeErrors(problems)
    resolved: dict[str, object] = recipe.model_dump(mode="json")
    return LoadedRecipe(recipe, storage.parent(path), resolved, stable_hash(resolved))


def _layers(path: str, profile: str | None, overrides: Sequence[str]) -> tuple[list[Layer], list[RecipeProblem]]:
    """Read every layer; without a readable file there are none, for then most errors would be about what it lacks."""
    files = [path] if profile is None else [path, profile]
    problems: list[RecipeProblem] = []
    layers = [_read(file, problems) for file in files]
    overridden, malformed = override_layers(overrides)
    readable = [layer for layer in layers if layer is not None]
    complete = len(readable) == len(files)
    return [*readable, *overridden] if complete else [], problems + malformed


def _read(file: str, problems: list[RecipeProblem]) -> Layer | None:
    """Read one YAML file of settings; None, with the reason among the problems, if there is nothing to merge."""
    try:
        text = storage.read_text(file)
    except FileNotFoundError:
        problems.append(RecipeProblem(file=file, key="", value="", rule="there is no such file"))
        return None
    except UnicodeDecodeError as error:
        problems.append(RecipeProblem(file=file, key="", value="", rule=f"this is not UTF-8 text: {error.reason} at byte {error.start}"))
        return None
    except OSError as error:
        problems.append(RecipeProblem(file=file, key="", value="", rule=f"this cannot be read: {error.strerror or error}"))
        return None
    document = parse_document(text, file)
    problems += document.problems
    if isinstance(document.value, dict):
        return Layer(file, document.value, document.lines)
    if not document.problems:
        rule = "this file is empty" if document.value is None else "expected a mapping of settings, KEY: VALUE"
        problems.append(RecipeProblem(file=file, key="", value="", rule=rule))
    return None


def _expand_sources(settings: dict[str, object]) -> None:
    """Write a source given as plain text out as `{url: text}`; the one shorthand, made for `--set data.sources.NAME=URL`."""
    data = settings.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    if isinstance(sources, dict):
        for name, source in sources.items():
            if isinstance(source, str):
                sources[name] = {"url": source}
