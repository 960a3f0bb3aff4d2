"""Model versions in the registry: find them by alias or number, list them, bring their bundle to this machine."""

import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from linearsr.bundle import MANIFEST
from linearsr_platform import storage
from linearsr_platform.errors import StageError, UserError
from linearsr_platform.registry.evaluation import Evaluation

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION = "champion"
CHALLENGER = "challenger"

SCHEME = "models:/"
BUNDLE_IN_MODEL = "artifacts/bundle"
"""Where the bundle lies inside a model version's files."""
DIGEST_TAG = "bundle_digest"
EVALUATION_TAG = "evaluation"
"""Means of every table, so that a list needs no file."""
EVALUATION_FILE_TAG = "evaluation_file"
"""Where the values per image are inside a version's files; named by its SHA-256."""
EXPERTS_TAG = "lineage.experts"
RULES_TAG = "promote_rules"
"""The gate that a version was registered with."""
KIND_TAG = "linearsr.kind"
"""On registered models that are no models, such as a history."""

_REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """One version of a registered model."""

    name: str
    version: int
    aliases: tuple[str, ...]
    created_s: float
    """Seconds since the epoch."""
    run_id: str | None
    """Run that registered it."""
    tags: Mapping[str, str]
    """Lineage, digest of the bundle, evaluation."""
    source: str = ""
    """URI of its files."""

    @property
    def label(self) -> str:
        """How people write it: `NAME/VERSION`."""
        return f"{self.name}/{self.version}"

    @property
    def evaluation(self) -> Evaluation | None:
        """The means stored with it; None if there are none. `read_evaluation` also gives the values per image.

        Raises:
            UserError: if somebody overwrote them with something else.
        """
        text = self.tags.get(EVALUATION_TAG)
        try:
            return None if text is None else Evaluation.from_json(text)
        except ValueError as error:
            raise UserError(f"{self.label}: tag {error}; fix: register the bundle again") from error


def bundle_digest(folder: Path) -> str:
    """Return the identity of a bundle: SHA-256 of its `bundle.json`, which holds the SHA-256 of every other file."""
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def list_models(client: "MlflowClient") -> tuple[ModelVersion, ...]:
    """List every version of every model, by name, newest first."""
    found: list[ModelVersion] = []
    with registry_errors("listing models"):
        for model in sorted(_models(client), key=lambda model: model.name):
            found += _versions(client, model.name, model.aliases)
    return tuple(found)


def find_reference(client: "MlflowClient", reference: str, *, default: str | None = None) -> ModelVersion:
    """Look up what people write: `NAME@ALIAS` or `NAME/VERSION`, with or without `models:/`; a bare `NAME` means its alias `default`.

    Raises:
        UserError: if it is written in another way, or there is no such model, alias or version; the message names the nearest.
    """
    text = reference if reference.startswith(SCHEME) else f"{SCHEME}{reference}"
    match = _REFERENCE.fullmatch(text) or (_REFERENCE.fullmatch(f"{text}@{default}") if default is not None else None)
    if match is None:
        raise UserError(f"model: got {reference!r}; expected NAME@ALIAS or NAME/VERSION, as in linearsr-quickstart@champion")
    return find_version(client, match["name"], match["alias"] or int(match["version"]))


def find_version(client: "MlflowClient", name: str, alias_or_version: str | int) -> ModelVersion:
    """Look one version up.

    Raises:
        UserError: if there is no such model, alias or version; the message names the nearest.
    """
    aliases = aliases_of(client, name)
    if isinstance(alias_or_version, str) and alias_or_version not in aliases:
        raise UserError(f"alias: got {SCHEME}{name}@{alias_or_version}; {_expected('alias', alias_or_version, aliases)}")
    version = aliases[alias_or_version] if isinstance(alias_or_version, str) else alias_or_version
    with registry_errors(f"reading the versions of {name!r}"):
        versions = {found.version: found for found in _versions(client, name, aliases)}
    if version not in versions:
        raise UserError(f"version: got {SCHEME}{name}/{version}; {_expected('version', str(version), map(str, sorted(versions)))}")
    return versions[version]


def find_by_digest(client: "MlflowClient", name: str, digest: str) -> ModelVersion | None:
    """Return the newest version of a model that holds a certain bundle, if there is one."""
    return next((found for found in _versions(client, name, aliases_of(client, name)) if found.tags.get(DIGEST_TAG) == digest), None)


def aliases_of(client: "MlflowClient", name: str) -> dict[str, int]:
    """Return alias to version of a registered model.

    Raises:
        UserError: if there is no such model; the message names the nearest.
    """
    from mlflow.exceptions import MlflowException

    try:
        return {alias: int(version) for alias, version in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise StageError(f"registry: reading {name!r} failed: {error}") from error
        known = [model.name for model in _models(client)]
        raise UserError(f"model: got {name!r}; {_expected('model', name, known)}") from error


def resolve(model: str, connect: Callable[[], "MlflowClient"], *, cache: Path | None = None) -> Path:
    """Return the local folder of a bundle.

    Args:
        model: `models:/NAME@ALIAS`, `models:/NAME/VERSION` or a folder.
        connect: gives the client of the registry; not called for a folder.
        cache: where bundles from a server are kept, by digest; `~/.cache/linearsr/models` by default. Files that are on this
            machine already are used where they are.

    Raises:
        UserError: if there is no such model or folder, or the bundle is not the one that was registered.
    """
    if not model.startswith("models:"):
        return _checked_folder(model)
    match = _REFERENCE.fullmatch(model)
    if match is None:
        raise UserError(f"model: got {model!r}; expected models:/NAME@ALIAS, models:/NAME/VERSION or a folder")
    client = connect()
    version = find_version(client, match["name"], match["alias"] or int(match["version"]))
    digest = version.tags.get(DIGEST_TAG)
    if digest is None:
        raise UserError(f"model: got {model!r}; expected a version registered by this program; it has no tag {DIGEST_TAG!r}")
    folder = _fetch(client, version, digest, cache or Path.home() / ".cache" / "linearsr" / "models")
    if bundle_digest(folder) != digest:
        raise UserError(f"{folder}: expected the bundle that was registered as {model}, SHA-256 {digest}; fix: register it again")
    return folder


def read_evaluation(client: "MlflowClient", version: ModelVersion) -> Evaluation | None:
    """Return the numbers of a version with the values per image, as far as they were kept; None if it was never evaluated.

    Raises:
        UserError: if the file is not the one that was registered.
        StageError: if it cannot be fetched.
    """
    file = version.tags.get(EVALUATION_FILE_TAG)
    if file is None:
        return version.evaluation
    text = _read_file(client, version, file)
    expected = file.rsplit("/", 1)[-1].removesuffix(".json")
    if hashlib.sha256(text).hexdigest() != expected:
        raise UserError(f"{version.label}: {file}: expected the evaluation that was registered, SHA-256 {expected}; fix: evaluate it again")
    try:
        return Evaluation.from_json(text.decode())
    except ValueError as error:
        raise UserError(f"{version.label}: {file}: {error}; fix: evaluate it again") from error


def ensure_model(client: "MlflowClient", name: str, tags: Mapping[str, str] | None = None, description: str | None = None) -> None:
    """Create a registered model unless it exists."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, tags=dict(tags or {}), description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


@contextmanager
def registry_errors(doing: str) -> Iterator[None]:
    """Turn a failure of MLflow inside the block into one sentence.

    Raises:
        StageError: saying what was being done and what MLflow answered.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise StageError(f"registry: {doing} failed: {error}") from error


def _checked_folder(path: str) -> Path:
    """Return a folder if a bundle is in it."""
    folder = Path(path).expanduser()
    if not (folder / MANIFEST).is_file():
        raise UserError(f"model: got {path!r}; expected a folder with a {MANIFEST}, or models:/NAME@ALIAS")
    return folder


def _fetch(client: "MlflowClient", version: ModelVersion, digest: str, cache: Path) -> Path:
    """Return the folder of a version's bundle, downloaded if it is not on this machine."""
    source, folder = _place(client, version)
    if folder is not None:
        return _checked_folder(str(folder / BUNDLE_IN_MODEL))
    target = cache / digest
    if not target.is_dir():
        with storage.atomic_folder(str(target)) as temporary:
            _download(client, f"{source}/{BUNDLE_IN_MODEL}", temporary)
    return _checked_folder(str(target / Path(BUNDLE_IN_MODEL).name))


def _read_file(client: "MlflowClient", version: ModelVersion, file: str) -> bytes:
    """Return one of a version's files."""
    source, folder = _place(client, version)
    if folder is not None:
        if not (folder / file).is_file():
            raise UserError(f"{version.label}: expected the file {folder / file}; fix: evaluate it again")
        return (folder / file).read_bytes()
    with TemporaryDirectory(prefix="linearsr-") as temporary:
        return _download(client, f"{source}/{file}", Path(temporary)).read_bytes()


def _place(client: "MlflowClient", version: ModelVersion) -> tuple[str, Path | None]:
    """Return the URI of a version's files, and their folder if it is on this machine."""
    with registry_errors(f"finding the files of {version.label}"):
        source = str(client.get_model_version_download_uri(version.name, str(version.version)))
    place = urlsplit(source)
    return source, Path(url2pathname(place.path) if place.scheme else source) if place.scheme in ("", "file") else None


def _download(client: "MlflowClient", uri: str, folder: Path) -> Path:
    from mlflow.artifacts import download_artifacts

    with registry_errors(f"downloading {uri}"):
        return Path(download_artifacts(artifact_uri=uri, dst_path=str(folder), tracking_uri=client.tracking_uri))


def _versions(client: "MlflowClient", name: str, aliases: Mapping[str, int]) -> list[ModelVersion]:
    """Return every version of a model, newest first; search results lack aliases, so they come from the model."""
    entities = pages(client.search_model_versions, filter_string=f"name = '{name}'")
    found = [
        ModelVersion(
            name=name,
            version=int(entity.version),
            aliases=tuple(sorted(alias for alias, version in aliases.items() if int(version) == int(entity.version))),
            created_s=entity.creation_timestamp / 1000,
            run_id=entity.run_id or None,
            tags=dict(entity.tags),
            source=entity.source,
        )
        for entity in entities
    ]
    return sorted(found, key=lambda version: -version.version)


def _models(client: "MlflowClient") -> Iterator[Any]:
    """Yield registered models that are models."""
    return (model for model in pages(client.search_registered_models) if KIND_TAG not in (model.tags or {}))


def pages(search: Callable[..., Any], **filters: str) -> Iterator[Any]:
    """Yield what an MLflow search finds, over all its pages."""
    page = search(**filters)
    yield from page
    while page.token:
        page = search(**filters, page_token=page.token)
        yield from page


def _expected(kind: str, value: str, known: Iterable[str]) -> str:
    """Say which names there are, and which is nearest."""
    names = list(known)
    if not names:
        return f"expected an existing {kind}, and there is none yet; fix: run a recipe up to its register stage"
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    return f"expected one of {', '.join(names)}" + (f"; fix: did you mean {near[0]!r}?" if near else "")
