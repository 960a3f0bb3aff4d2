"""Find photographs and their labels: in folders, globs, remote stores and installed packages."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from linearsr_platform import storage
from linearsr_platform.data.images import SUFFIXES
from linearsr_platform.data.labels import Label, read_side_file, read_table
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.data_schema import DataConfig, SourceConfig

PACKAGE_SCHEME = "package://"
DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn", "cv2": "opencv-python", "PIL": "pillow"}
"""What to `pip install` for a module whose distribution has another name."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image file that may become a sample."""

    source: str
    """Name of its source in the recipe."""
    file: str
    """Path below the source's folder, with `/`."""
    url: str
    label: Label
    problem: str = ""
    """Why its label cannot be read; empty if it can."""

    @property
    def name(self) -> str:
        """How reports call it: source and file, free of where they lie on this machine."""
        return f"{self.source}/{self.file}"

    @property
    def stem(self) -> str:
        """File name without folder and suffix."""
        return PurePosixPath(self.file).stem


def find_candidates(config: DataConfig, recipe_folder: str) -> list[Candidate]:
    """List the images of all sources with their labels, in order of source and file.

    Raises:
        UserError: if a source is not there or empty, a table is broken or names a file that no source with this table
            has, or a held-out stem fits no image.
    """
    tables = {source.table: read_table(storage.absolute(source.table, recipe_folder)) for source in config.sources.values() if source.table}
    found: list[Candidate] = []
    used: dict[str, set[str]] = {table: set() for table in tables}
    for name, source in sorted(config.sources.items()):
        listing = list_source(name, source)
        images = [file for file in sorted(listing) if file.lower().endswith(SUFFIXES)]
        if not images:
            raise UserError(f"data.sources.{name}.url: got {source.url!r} without images; expected files ending in {' '.join(SUFFIXES)}")
        if source.table is None:
            found += [_with_side_file(name, file, listing) for file in images[: source.limit]]
            continue
        rows = {file: row for file in images if (row := _row_of(file, tables[source.table])) is not None}
        used[source.table].update(rows.values())
        labelled = [Candidate(name, file, listing[file], tables[source.table][row]) for file, row in rows.items()]
        found += labelled[: source.limit]
    for table, rows_used in used.items():
        _refuse_missing(table, sorted(set(tables[table]) - rows_used), config)
    _refuse_unknown_stems(config.held_out, found)
    return found


def list_source(name: str, source: SourceConfig) -> dict[str, str]:
    """List the files of a source: path below its folder -> URL. A glob lists the files it fits and their side files.

    Raises:
        UserError: if there is no such folder, package or file system.
    """
    key = f"data.sources.{name}.url"
    url = _package_folder(key, source.url) if source.url.startswith(PACKAGE_SCHEME) else source.url
    fs, path = storage.filesystem(url)
    try:
        if fs.isdir(path):
            root, paths = path.rstrip("/"), fs.find(path)
        elif fs.isfile(path):
            root, paths = path.rpartition("/")[0], [path]
        else:
            root = _root_of_glob(path)
            images = fs.glob(path)
            stems = {image.rpartition(".")[0] for image in images}
            sides = [side for side in fs.find(root) if side.endswith((".json", ".txt")) and side.rpartition(".")[0] in stems]
            paths = [*images, *sides] if images else []
    except OSError as error:
        raise UserError(f"{key}: got {source.url!r}; expected something readable: {error}") from error
    if not paths:
        where = storage.absolute(url)
        raise UserError(f"{key}: got {source.url!r}, but there is no file at {where}; expected a folder, a glob or an fsspec URL")
    return {file[len(root) :].lstrip("/"): str(fs.unstrip_protocol(file)) for file in paths}


def _package_folder(key: str, url: str) -> str:
    """Return the folder inside an installed package, found without importing the package."""
    package, _, below = url.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        wanted = DISTRIBUTIONS.get(package, package.replace("_", "-"))
        raise UserError(f"{key}: got {url!r}; expected an installed Python package; fix: pip install {wanted}")
    folders = [Path(location, below) for location in spec.submodule_search_locations]
    existing = [folder for folder in folders if folder.is_dir()]
    if not existing:
        raise UserError(f"{key}: got {url!r}; expected a folder inside the package, but {folders[0]} does not exist")
    return str(existing[0])


def _root_of_glob(path: str) -> str:
    """Return the folder above the first part of a path that holds a wildcard."""
    plain = []
    for part in path.split("/")[:-1]:
        if any(mark in part for mark in "*?["):
            break
        plain.append(part)
    return "/".join(plain)


def _row_of(file: str, table: Mapping[str, Label]) -> str | None:
    """Return the table's name of a file: its path below the source, or its bare name."""
    return next((name for name in (file, PurePosixPath(file).name) if name in table), None)


def _with_side_file(source: str, file: str, listing: Mapping[str, str]) -> Candidate:
    """Label an image by `NAME.json`, or else `NAME.txt`, beside it."""
    stem = file.rpartition(".")[0]
    side = next((name for name in (f"{stem}.json", f"{stem}.txt") if name in listing), None)
    if side is None:
        return Candidate(source, file, listing[file], Label())
    try:
        return Candidate(source, file, listing[file], read_side_file(listing[side]))
    except (ValueError, FileNotFoundError, PermissionError) as error:
        return Candidate(source, file, listing[file], Label(), problem=f"its label {PurePosixPath(side).name} cannot be read: {error}")


def _refuse_missing(table: str, missing: Sequence[str], config: DataConfig) -> None:
    """Raise if a table names files that none of its sources has."""
    if missing:
        sources = ", ".join(name for name, source in sorted(config.sources.items()) if source.table == table)
        raise UserError(f"table {table}: got {', '.join(missing)}, found in none of its sources ({sources}); expected files that exist")


def _refuse_unknown_stems(held_out: Sequence[str], found: Sequence[Candidate]) -> None:
    """Raise if a stem that must be held out fits no image: a slip of the pen would train on it."""
    stems = sorted({candidate.stem for candidate in found})
    for stem in held_out:
        if stem not in stems:
            near = difflib.get_close_matches(stem, stems, n=1)
            hint = f"; fix: {near[0]!r}?" if near else ""
            raise UserError(f"data.held_out: got {stem!r}; expected the stem of an image in data.sources{hint}")
