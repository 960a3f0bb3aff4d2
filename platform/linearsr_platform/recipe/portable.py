"""A loaded recipe as a folder that means the same on another machine: every setting written out, tables beside it."""

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel

from linearsr_platform import storage
from linearsr_platform.errors import RecipeErrors, RecipeProblem
from linearsr_platform.recipe.document import write_document
from linearsr_platform.recipe.load import LoadedRecipe

RECIPE_FILE = "recipe.yaml"
PATHS = ("storage", "validation.weights", "model.init_weights", "model.text.folder")
"""Dotted keys of settings that are paths, those of the data sources apart; a codec's source may be the id of a hub."""
HERE = "package://"
"""Begins a URL that means a folder inside an installed package, wherever that is."""


def write_portable(loaded: LoadedRecipe, folder: Path, *, address: str) -> None:
    """Write `recipe.yaml` and the tables it names into an empty folder.

    Args:
        loaded: the recipe, complete.
        folder: local folder.
        address: of the Ray cluster as a job on it sees it; replaces the recipe's.

    Raises:
        RecipeErrors: if settings are paths that mean something on this machine only, or hold a password.
    """
    problems = [*_local_paths(loaded), *_passwords(loaded.recipe.model_dump(mode="json"))]
    if problems:
        raise RecipeErrors(problems)
    settings = _with_excluded(loaded.recipe, loaded.resolved)
    settings["cluster"] = {**_section(settings["cluster"]), "address": address}
    data = _section(settings["data"])
    sources = {name: _section(source) for name, source in _section(data["sources"]).items()}
    # By table: every file that a table names must be in one of the sources that share it.
    names = {str(source["table"]): f"{name}.csv" for name, source in sources.items() if source["table"] is not None}
    for table, name in names.items():
        (folder / name).write_text(storage.read_text(storage.absolute(table, loaded.folder)), encoding="utf-8")
    for source in sources.values():
        if source["table"] is not None:
            source["table"] = names[str(source["table"])]
    settings["data"] = {**data, "sources": sources}
    (folder / RECIPE_FILE).write_text(write_document(settings), encoding="utf-8")


def _with_excluded(model: BaseModel, plain: Mapping[str, object]) -> dict[str, object]:
    """Add the settings that are no part of a recipe's identity, such as caches and loaders: they are settings all the same."""
    found = dict(plain)
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if field.exclude:
            found[name] = value
        elif isinstance(value, BaseModel) and isinstance(inner := found.get(name), dict):
            found[name] = _with_excluded(value, inner)
    return found


def _local_paths(loaded: LoadedRecipe) -> list[RecipeProblem]:
    """Find relative paths: a job has a working directory of its own, which goes when it ends."""
    values = {key: _value(loaded.resolved, key) for key in PATHS}
    values["data.cache_folder"] = loaded.recipe.data.cache_folder
    values |= {f"data.sources.{name}.url": source.url for name, source in loaded.recipe.data.sources.items()}
    return [
        RecipeProblem(
            file="submit",
            key=key,
            value=repr(value),
            rule="a URL, or an absolute path that every node of the cluster has",
            fix=f"--set {key}=s3://BUCKET/..., or a --profile of the cluster that sets it",
        )
        for key, value in values.items()
        if isinstance(value, str) and not value.startswith(HERE) and storage.is_local(value) and not _is_absolute(value)
    ]


def _is_absolute(path: str) -> bool:
    return Path(path.removeprefix("file://").removeprefix("local://")).is_absolute()


def _passwords(value: object, key: str = "") -> list[RecipeProblem]:
    """Find URLs with a password: a recipe is kept in many places and shown in more."""
    if isinstance(value, dict):
        return [problem for name, inner in value.items() for problem in _passwords(inner, f"{key}.{name}".lstrip("."))]
    if not isinstance(value, str) or "://" not in value or urlsplit(value).password is None:
        return []
    fix = "name the secret in cluster.secrets, as in cluster.secrets.MLFLOW_TRACKING_PASSWORD=env:MLFLOW_TRACKING_PASSWORD"
    return [RecipeProblem(file="submit", key=key, value="a URL with a password", rule="a URL without one", fix=fix)]


def _value(settings: dict[str, object], key: str) -> object:
    """Return the value of a dotted key; None where a section on the way is not set."""
    value: object = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _section(value: object) -> dict[str, object]:
    assert isinstance(value, dict)  # noqa: S101 (the schema says so)
    return dict(value)
