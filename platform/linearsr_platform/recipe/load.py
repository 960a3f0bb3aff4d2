"""Reads a recipe: YAML file, then a profile on top, then `--set` overrides, then everything is checked at once."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from linearsr_platform import storage
from linearsr_platform.errors import RecipeErrors, RecipeProblem
from linearsr_platform.recipe.document import KeyPath, dotted, parse_document
from linearsr_platform.recipe.identity import stable_hash
from linearsr_platform.recipe.merge import Layer, Merged, override_layers
from linearsr_platform.recipe.schema import Recipe
from linearsr_platform.recipe.validate import validate

EXTENDS = "extends"
"""Key of a recipe file that names another recipe, whose settings it changes."""
FOUND = "from:"
"""Before the name of a search: the boundaries that it found."""
BOUNDARIES_FILE = "boundaries.yaml"
"""What a search leaves in its folder: a fragment of a recipe with the best boundaries."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe that passed every check."""

    recipe: Recipe
    folder: str
    """Folder of the recipe file, absolute path or URL; tables of the data sources are relative to it."""
    resolved: dict[str, object]
    """Every setting with its default filled in, JSON-able; without `sampler.history` unless it is set (see `SamplerConfig.to_plain`).
    It is kept and shown, so passwords in URLs are `***`."""
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
    problems += _expand_boundaries(merged)
    recipe, broken = validate(merged)
    # A value that could not be read is no value of its key's type either; once is enough.
    unread = {problem.key for problem in problems if problem.value}
    problems += [problem for problem in broken if problem.key not in unread]
    problems += _broken_urls(merged.settings, (), merged)
    if problems:
        raise RecipeErrors(problems)
    resolved = _without_passwords(recipe.model_dump(mode="json"))
    return LoadedRecipe(recipe, storage.parent(path), resolved, stable_hash(resolved))


def _broken_urls(value: object, path: KeyPath, merged: Merged) -> Iterator[RecipeProblem]:
    """Yield every URL below a path that cannot be taken apart."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _broken_urls(item, (*path, key), merged)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _broken_urls(item, (*path, index), merged)
    elif isinstance(value, str) and "://" in value:
        try:
            urlsplit(value)
        except ValueError as error:
            yield RecipeProblem(file=merged.origin(path), key=dotted(path), value=value, rule=f"a URL, but this one is broken: {error}")


def _without_passwords(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_passwords(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_passwords(item) for item in value]
    password = urlsplit(value).password if isinstance(value, str) and "://" in value else None
    return value.replace(f":{password}@", ":***@") if password else value


def _layers(path: str, profile: str | None, overrides: Sequence[str]) -> tuple[list[Layer], list[RecipeProblem]]:
    """Read every layer; without a readable file there are none, for then most errors would be about what it lacks."""
    problems: list[RecipeProblem] = []
    layers = _with_bases(path, problems)
    if profile is not None:
        layers.append(_read(profile, problems))
    overridden, malformed = override_layers(overrides)
    readable = [layer for layer in layers if layer is not None]
    return [*readable, *overridden] if len(readable) == len(layers) else [], problems + malformed


def _with_bases(path: str, problems: list[RecipeProblem]) -> list[Layer | None]:
    """Read a recipe and before it the one that it `extends`, and so on."""
    layers: list[Layer | None] = []
    seen: list[str] = []
    file: str | None = path
    while file is not None:
        seen.append(storage.absolute(file))
        layer = _read(file, problems)
        layers.insert(0, layer)
        if layer is not None:
            _rebase_tables(layer.settings, storage.parent(file), storage.parent(path))
        base = None if layer is None else layer.settings.pop(EXTENDS, None)
        if layer is None or base is None:
            break
        where = layer.origin((EXTENDS,))
        if not isinstance(base, str):
            problems.append(RecipeProblem(file=where, key=EXTENDS, value=str(base), rule="the path of a recipe, relative to this one"))
            break
        file = storage.absolute(base, storage.parent(file))
        if file in seen:
            problems.append(RecipeProblem(file=where, key=EXTENDS, value=base, rule="a recipe that does not extend this one"))
            break
    return layers


def _rebase_tables(settings: dict[str, object], here: str, there: str) -> None:
    """Write the tables of sources, which are relative to the recipe's folder `here`, relative to `there`."""
    data = settings.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    if here == there or not isinstance(sources, dict):
        return
    for source in sources.values():
        if isinstance(source, dict) and isinstance(source.get("table"), str):
            table = storage.absolute(source["table"], here)
            source["table"] = os.path.relpath(table, there) if storage.is_local(table) and storage.is_local(there) else table


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


def _expand_boundaries(merged: Merged) -> list[RecipeProblem]:
    """Put the numbers that a search has found in the place of `from:NAME`, so that they are part of the recipe's identity."""
    path: KeyPath = ("experts", "boundaries")
    wanted = merged.value(path)
    if not isinstance(wanted, str) or not wanted.startswith(FOUND):
        return []
    root = merged.value(("storage",))
    root = root if isinstance(root, str) else str(Recipe.model_fields["storage"].default)
    file = storage.join(root, wanted.removeprefix(FOUND), BOUNDARIES_FILE)
    problems: list[RecipeProblem] = []
    layer = _read(file, problems)
    section = {} if layer is None else layer.settings.get("experts")
    found = section.get("boundaries") if isinstance(section, dict) else None
    experts = merged.settings["experts"]
    assert isinstance(experts, dict)  # noqa: S101 (the value was found in it)
    if not isinstance(found, list):
        experts["boundaries"] = "bisection"
        done = [storage.name_of(folder) for folder in storage.list_folders(root) if storage.exists(storage.join(folder, BOUNDARIES_FILE))]
        rule = f"from:NAME of a search that has ended under {root}" + (f" ({', '.join(done)})" if done else "")
        fix = "run `linearsr search` first, or name its storage root"
        return [RecipeProblem(file=merged.origin(path), key=dotted(path), value=wanted, rule=rule, fix=fix)]
    experts["boundaries"] = found
    return []
