"""Find photographs and their labels: in folders, globs, remote stores, installed packages and WebDataset tars."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec import AbstractFileSystem

from linearsr_platform import storage
from linearsr_platform.data.executor import Choose, OnProgress, alone
from linearsr_platform.data.images import SUFFIXES
from linearsr_platform.data.labels import Label, parse_label, read_table
from linearsr_platform.data.tars import Member, index_tar, read_part
from linearsr_platform.errors import StageError, UserError
from linearsr_platform.local import files_below
from linearsr_platform.recipe.data_schema import DataConfig, SourceConfig
from linearsr_platform.remote import passes

PACKAGE_SCHEME = "package://"
DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn", "cv2": "opencv-python", "PIL": "pillow"}
"""What to `pip install` for a module whose distribution has another name."""
TAR = ".tar"
MEMBER_LABELS = (".json", ".txt", ".cls")
"""Files of a WebDataset sample that label its picture, the first that is there; beside a picture in a folder the first two."""
MARKS = ("ETag", "etag", "md5Hash", "mtime", "created", "LastModified")
"""Facts about a file that change with its content, as file systems call them, best first."""
MEMBER_BYTES = 100_000
"""What a photograph in a tar is taken to have until the tar is looked into, to tell whether that is much work."""
LABELS_A_PIECE = 64
"""Side files that one piece of work reads."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file of a source."""

    url: str
    stamp: str
    """Changes when the file does: its size, and its hash or time of change."""
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image file, or an image in a tar, that may become a sample."""

    source: str
    """Name of its source in the recipe."""
    file: str
    """Path below the source's folder, with `/`; of an image in a tar, the tar's with the member's name behind it."""
    url: str
    """The file, or the tar."""
    label: Label
    problem: str = ""
    """Why its label cannot be read; empty if it can."""
    span: tuple[int, int] | None = None
    """Offset and size of its bytes in the tar; None is a file of its own."""
    stamp: str = ""
    """See `Found.stamp`."""

    @property
    def name(self) -> str:
        """How reports call it: source and file, free of where they lie on this machine."""
        return f"{self.source}/{self.file}"

    @property
    def stem(self) -> str:
        """File name without folder and suffix."""
        return PurePosixPath(self.file).stem

    def read(self) -> bytes:
        """Read its bytes, of a tar only those.

        Raises:
            OSError: if that fails.
        """
        return storage.read_bytes(self.url) if self.span is None else read_part(self.url, *self.span)


@dataclass(frozen=True, slots=True)
class _Labelling:
    """Images of one source whose side files are to be read."""

    name: str
    images: tuple[tuple[str, Found, str], ...]
    """File, where it is, and the URL of its side file."""


@dataclass(frozen=True, slots=True)
class _Tar:
    """A tar to look into."""

    name: str
    """Of its source."""
    file: str
    found: Found


def find_candidates(
    config: DataConfig, recipe_folder: str, choose: Choose = alone, report: OnProgress = lambda *_: None
) -> list[Candidate]:
    """List the images of all sources with their labels, in order of source and file.

    Args:
        config: for `sources` and `held_out`.
        recipe_folder: where tables are looked for.
        choose: who looks into tars and reads side files.
        report: told about every tar.

    Raises:
        UserError: if a source is not there or empty, a tar or a table is broken or a table names a file that no source with
            it has, or a held-out stem fits no image.
    """
    tables = {source.table: read_table(storage.absolute(source.table, recipe_folder)) for source in config.sources.values() if source.table}
    found: list[Candidate] = []
    used: dict[str, set[str]] = {table: set() for table in tables}
    for name, source in sorted(config.sources.items()):
        images = _images_of(name, list_source(name, source), choose, report, labelled=source.table is None)
        if not images:
            kinds = f"{' '.join(SUFFIXES)}, or {TAR} files with such inside"
            raise UserError(f"data.sources.{name}.url: got {source.url!r} without images; expected files ending in {kinds}")
        if source.table is None:
            found += images[: source.limit]
            continue
        rows = {image.file: row for image in images if (row := _row_of(image.file, tables[source.table])) is not None}
        used[source.table].update(rows.values())
        labelled = [_relabelled(image, tables[source.table][rows[image.file]]) for image in images if image.file in rows]
        found += labelled[: source.limit]
    for table, rows_used in used.items():
        _refuse_missing(table, sorted(set(tables[table]) - rows_used), config)
    _refuse_unknown_stems(config.held_out, found)
    return found


def count_pictures(config: DataConfig, recipe_folder: str) -> tuple[int, bool]:
    """Return how many image files the sources take, and whether some are tars: those are not looked into and count as one.

    Args:
        config: for `sources`.
        recipe_folder: where tables are looked for.

    Raises:
        UserError: if a source is not there, or a table is broken.
    """
    count, has_tars = 0, False
    for name, source in config.sources.items():
        listing = list_source(name, source)
        images = [file for file in listing if file.lower().endswith(SUFFIXES)]
        tars = sum(file.lower().endswith(TAR) for file in listing)
        if source.table is not None:
            table = read_table(storage.absolute(source.table, recipe_folder))
            images = [file for file in images if _row_of(file, table) is not None]
        taken = len(images) + tars
        count += taken if source.limit is None else min(taken, source.limit)
        has_tars |= tars > 0
    return count, has_tars


def list_source(name: str, source: SourceConfig) -> dict[str, Found]:
    """List the files of a source by their path below its folder. A glob lists the files it fits and their side files.

    Raises:
        UserError: if there is no such folder, package or file system.
    """
    key = f"data.sources.{name}.url"
    url = _package_folder(key, source.url) if source.url.startswith(PACKAGE_SCHEME) else source.url
    try:
        found = storage.call(url, _listing)
    except OSError as error:
        raise UserError(f"{key}: got {source.url!r}; expected something readable: {error}") from error
    if not found:
        where = storage.absolute(url)
        raise UserError(f"{key}: got {source.url!r}, but there is no file at {where}; expected a folder, a glob or an fsspec URL")
    return found


def _listing(fs: AbstractFileSystem, path: str) -> dict[str, Found]:
    """List the files of a folder, one file, or those of a glob with the side files beside them."""
    there = storage.look(fs, path)
    if there is not None and there["type"] == "directory":
        root, infos = path.rstrip("/"), files_below(fs, path)
    elif there is not None:
        root, infos = path.rpartition("/")[0], {path: there}
    else:
        root = root_of_glob(path)
        images = fs.glob(path)
        stems = {image.rpartition(".")[0] for image in images}
        below = fs.find(root, detail=True) if images else {}
        chosen = {*images, *(side for side in below if side.endswith(MEMBER_LABELS[:2]) and side.rpartition(".")[0] in stems)}
        infos = {file: info for file, info in below.items() if file in chosen}
    return {_readable(file[len(root) :].lstrip("/")): _found(str(fs.unstrip_protocol(file)), info) for file, info in infos.items()}


def _readable(name: str) -> str:
    r"""Return a name that can be written down: bytes of it that are no UTF-8 become `\xff`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _found(url: str, info: Mapping[str, Any]) -> Found:
    mark = next((str(info[name]) for name in MARKS if name in info), "")
    size = int(info.get("size") or 0)
    return Found(url, f"{size}-{mark}", size)


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


def root_of_glob(path: str) -> str:
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


def _images_of(name: str, listing: Mapping[str, Found], choose: Choose, report: OnProgress, *, labelled: bool) -> list[Candidate]:
    """Return the images of a source in order of file, those in its tars included, with the labels beside them if `labelled`."""
    images = [file for file in sorted(listing) if file.lower().endswith(SUFFIXES)]
    sides = {file: _side_of(file, listing) if labelled else None for file in images}
    found = [Candidate(name, file, listing[file].url, Label(), stamp=listing[file].stamp) for file in images if sides[file] is None]
    beside = [(file, listing[file], listing[side].url) for file, side in sides.items() if side is not None]
    chunks = [_Labelling(name, tuple(beside[start : start + LABELS_A_PIECE])) for start in range(0, len(beside), LABELS_A_PIECE)]
    tars = [_Tar(name, file, listing[file]) for file in sorted(listing) if file.lower().endswith(TAR)]
    for _, part in choose(len(beside)).map_unordered(_with_side_files, chunks):
        found += part
    guess = max(len(tars), sum(tar.found.bytes for tar in tars) // MEMBER_BYTES)
    for done, (_, part) in enumerate(choose(guess).map_unordered(_in_tar, tars), start=1):
        found += part
        report(done, len(tars), f"listing the tars of {name}")
    return sorted(found, key=lambda one: one.file)


def _side_of(file: str, listing: Mapping[str, Found]) -> str | None:
    """Return `NAME.json`, or else `NAME.txt`, beside an image."""
    stem = file.rpartition(".")[0]
    return next((f"{stem}{suffix}" for suffix in MEMBER_LABELS[:2] if f"{stem}{suffix}" in listing), None)


def is_away(url: str, error: OSError) -> bool:
    """Tell whether an error says nothing about a file, but that its store throttles, or that the credentials for it ran out."""
    return passes(error) or (isinstance(error, PermissionError) and not storage.is_local(url))


def away(url: str, error: OSError) -> StageError:
    """Return the error of a file whose store `is_away`."""
    told = f"{storage.shown(url)}: cannot be fetched: {storage.shown(str(error))}"
    return StageError(f"{told}; fix: the store or the credentials, and run the stage again")


def _with_side_files(work: _Labelling) -> list[Candidate]:
    """Read the side files of some images."""
    candidates = []
    for file, found, side in work.images:
        try:
            label, problem = parse_label(side, storage.read_bytes(side)), ""
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and is_away(side, error):
                raise away(side, error) from error
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | PermissionError):
                raise
            label, problem = Label(), _unreadable(side, error)
        candidates.append(Candidate(work.name, file, found.url, label, problem, stamp=found.stamp))
    return candidates


def _in_tar(tar: _Tar) -> list[Candidate]:
    """List the images of a tar with the labels beside them; the tar is gone through once."""
    members = index_tar(tar.found.url, lambda name: name.endswith(MEMBER_LABELS))
    labels: dict[str, Member] = {}
    for suffix in MEMBER_LABELS:
        for member in members:
            if member.name == f"{member.key}{suffix}":
                labels.setdefault(member.key, member)
    candidates = []
    seen: dict[str, int] = {}
    for member in members:
        # `KEY.seg.png` and the like belong to a picture, and are none.
        if not member.name.lower().endswith(SUFFIXES) or "." in member.name[len(member.key) + 1 :]:
            continue
        label, problem, side = Label(), "", labels.get(member.key)
        seen[member.name] = seen.get(member.name, 0) + 1
        if seen[member.name] > 1:
            problem = "another member of the tar has the same name"
        elif side is not None and side.content is not None:
            try:
                label = parse_label(side.name, side.content)
            except ValueError as error:
                problem = _unreadable(side.name, error)
        again = f"#{seen[member.name]}" if seen[member.name] > 1 else ""
        file, span = f"{tar.file}/{_readable(member.name.removeprefix('./'))}{again}", (member.offset, member.size)
        candidates.append(Candidate(tar.name, file, tar.found.url, label, problem, span, tar.found.stamp))
    return candidates


def _relabelled(image: Candidate, label: Label) -> Candidate:
    return Candidate(image.source, image.file, image.url, label, span=image.span, stamp=image.stamp)


def _unreadable(side: str, error: Exception) -> str:
    return f"its label {PurePosixPath(side).name} cannot be read: {error}"


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
