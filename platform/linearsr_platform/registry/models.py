"""Model versions in the registry: find them by alias or number, list them, bring their bundle to this machine."""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from linearsr.bundle import MANIFEST
from linearsr_platform import storage
from linearsr_platform.errors import StageError, UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION = "champion"
CHALLENGER = "challenger"

SCHEME = "models:/"
BUNDLE_IN_MODEL = "artifacts/bundle"
"""Where the bundle lies inside a model version's files."""
DIGEST_TAG = "bundle_digest"
EVALUATION_TAG = "evaluation"

_REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The numbers of a bundle, with what makes them comparable."""

    protocol: Mapping[str, object]
    """How they were measured: degradation, crop, seed, steps, weights of metrics. JSON."""
    test_set: str
    """Hash of the images they were measured on."""
    rows: Mapping[str, Mapping[str, float]]
    """Estimate (`one_step`, `routed`, `bicubic`) to metric name to mean value."""

    @classmethod
    def from_json(cls, text: str) -> "Evaluation":
        """Read it from the JSON that `to_json` writes.

        Raises:
            ValueError: if the text is anything else.
        """
        try:
            value = json.loads(text)
            rows = {row: {name: float(number) for name, number in values.items()} for row, values in value["rows"].items()}
            return cls(protocol=dict(value["protocol"]), test_set=str(value["test_set"]), rows=rows)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"evaluation: got {text[:200]!r}; expected JSON with protocol, test_set and rows") from error

    def to_json(self) -> str:
        """Write it as JSON; the inverse of `from_json`."""
        rows = {row: dict(values) for row, values in self.rows.items()}
        return json.dumps({"protocol": dict(self.protocol), "test_set": self.test_set, "rows": rows}, sort_keys=True)


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

    @property
    def evaluation(self) -> Evaluation | None:
        """The numbers stored with it; None if there are none.

        Raises:
            UserError: if somebody overwrote them with something else.
        """
        text = self.tags.get(EVALUATION_TAG)
        try:
            return None if text is None else Evaluation.from_json(text)
        except ValueError as error:
            raise UserError(f"{self.name} version {self.version}: tag {error}; fix: register the bundle again") from error


def bundle_digest(folder: Path) -> str:
    """Return the identity of a bundle: SHA-256 of its `bundle.json`, which holds the SHA-256 of every other file."""
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def list_models(client: "MlflowClient") -> tuple[ModelVersion, ...]:
    """List every version of every model, by name, newest first."""
    found: list[ModelVersion] = []
    with registry_errors("listing models"):
        for model in sorted(_pages(client.search_registered_models), key=lambda model: model.name):
            found += _versions(client, model.name, model.aliases)
    return tuple(found)


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
        known = [model.name for model in _pages(client.search_registered_models)]
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
    from mlflow.artifacts import download_artifacts

    with registry_errors(f"finding the files of {version.name!r} version {version.version}"):
        source = str(client.get_model_version_download_uri(version.name, str(version.version)))
    place = urlsplit(source)
    if place.scheme in ("", "file"):
        return _checked_folder(str(Path(url2pathname(place.path) if place.scheme else source) / BUNDLE_IN_MODEL))
    target = cache / digest
    if not target.is_dir():
        with storage.atomic_folder(str(target)) as temporary, registry_errors(f"downloading {source}"):
            download_artifacts(artifact_uri=f"{source}/{BUNDLE_IN_MODEL}", dst_path=str(temporary), tracking_uri=client.tracking_uri)
    return _checked_folder(str(target / Path(BUNDLE_IN_MODEL).name))


def _versions(client: "MlflowClient", name: str, aliases: Mapping[str, int]) -> list[ModelVersion]:
    """Return every version of a model, newest first; search results lack aliases, so they come from the model."""
    entities = _pages(client.search_model_versions, filter_string=f"name = '{name}'")
    found = [
        ModelVersion(
            name=name,
            version=int(entity.version),
            aliases=tuple(sorted(alias for alias, version in aliases.items() if int(version) == int(entity.version))),
            created_s=entity.creation_timestamp / 1000,
            run_id=entity.run_id or None,
            tags=dict(entity.tags),
        )
        for entity in entities
    ]
    return sorted(found, key=lambda version: -version.version)


def _pages(search: Callable[..., Any], **filters: str) -> Iterator[Any]:
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
