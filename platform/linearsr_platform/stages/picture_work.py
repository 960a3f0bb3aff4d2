"""Which file becomes which, found out before anything is enlarged: a picture, a folder, a glob, a shard; paths or fsspec URLs."""

import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath

from fsspec.utils import glob_translate

from linearsr.picture_files import INPUT_SUFFIXES, OUTPUT_SUFFIXES
from linearsr_platform import storage
from linearsr_platform.errors import UserError

SHARD = ".tar"


@dataclass(frozen=True, slots=True)
class Job:
    """One file to read and one to write, as paths or URLs."""

    source: str
    target: str

    @property
    def name(self) -> str:
        """What an error calls it."""
        return storage.shown(self.source)

    @property
    def is_shard(self) -> bool:
        """Tell whether the file is a tar of pictures."""
        return _suffix(self.source) == SHARD

    def absolute(self) -> "Job":
        """Return the same job for a process with another working directory."""
        return Job(storage.absolute(self.source), storage.absolute(self.target))


@dataclass(frozen=True, slots=True)
class Work:
    """Everything one command does."""

    jobs: tuple[Job, ...]
    folder: str | None = None
    """Where all is written; None if one file was named, so that a mistake in it is the user's."""

    @property
    def single(self) -> bool:
        """Whether one file was named."""
        return self.folder is None

    def finished(self) -> frozenset[Job]:
        """Return the jobs whose target is there; a target is there only as a whole.

        Raises:
            OSError: if a store cannot be asked.
        """
        if self.folder is None:
            return frozenset(job for job in self.jobs if storage.kind(job.target) is not None)
        # One listing instead of a question for each of a million files.
        there = set(storage.list_files(self.folder))
        return frozenset(job for job in self.jobs if storage.absolute(job.target) in there)


def find_work(source: str, target: str | None) -> Work:
    """Return what is to be done, with every problem of the arguments found; without a target nothing is to be written.

    Args:
        source: path or URL of a picture, a folder, a shard, or a glob.
        target: path or URL; one that ends in `/` is a folder though it does not exist yet.

    Raises:
        UserError: if there is nothing to read, or a target's format cannot be written.
        OSError: if a store cannot be asked.
    """
    for name, given in (("IN", source), ("OUT", target)):
        # Of a variable that is not set, say: it would be the folder that the command runs in.
        if given == "":
            raise UserError(f"{name}: got an empty text; expected a path or a URL; fix: . is the working directory")
    source, into = _plain(source), target is not None and target.endswith("/")
    kind = storage.kind(source)
    target = _default_target(source, kind) if target is None else _plain(target)
    if kind == "folder":
        _refuse_file(target, source, into=into)
        return _into_folder(_inside(source), source, target, f"{storage.shown(source)}: got a folder without images")
    if kind is None and glob.has_magic(source):
        _refuse_file(target, source, into=into)
        return _into_folder(*_matching(source), target, f"{storage.shown(source)}: matches no image")
    if kind is None:
        raise UserError(f"{storage.shown(source)}: no such file or folder")
    into = into or storage.kind(target) == "folder"
    if _suffix(source) == SHARD:
        target = _below(target, storage.name_of(source)) if into else target
        if _suffix(target) != SHARD:
            raise UserError(f"{target}: got suffix {_suffix(target)!r}; expected {SHARD}, because {source} is a shard")
        return Work((Job(source, target),))
    if into:
        target = _below(target, _renamed(storage.name_of(source)))
    if _suffix(target) not in OUTPUT_SUFFIXES:
        raise UserError(f"{target}: got suffix {_suffix(target)!r}; expected one of {', '.join(OUTPUT_SUFFIXES)}")
    return Work((Job(source, target),))


def _plain(url: str) -> str:
    """Return a URL without a slash at its end, and a path as one."""
    if "://" in url and storage.is_local(url):
        url = storage.absolute(url)
    return os.path.normpath(url) if storage.is_local(url) else url.rstrip("/")


def _suffix(url: str) -> str:
    return PurePosixPath(storage.name_of(url)).suffix.lower()


def _below(folder: str, name: str) -> str:
    """Return the URL of a file in a folder; a relative path stays one."""
    return os.path.join(folder, name) if storage.is_local(folder) else storage.join(folder, name)


def _default_target(source: str, kind: str | None) -> str:
    stem = PurePosixPath(storage.name_of(source)).stem
    if kind != "file":
        return f"{stem}-enlarged"
    name = f"{stem}-enlarged{PurePosixPath(_renamed(storage.name_of(source))).suffix}"
    return os.path.join(os.path.dirname(source), name) if storage.is_local(source) else storage.join(storage.parent(source), name)


def _inside(folder: str) -> list[str]:
    """List pictures and shards at any depth, by their path below the folder."""
    start = len(storage.absolute(folder).rstrip("/")) + 1
    return [name for url in storage.list_files(folder) if _suffix(name := url[start:]) in (*INPUT_SUFFIXES, SHARD)]


def _matching(pattern: str) -> tuple[list[str], str]:
    """List the pictures and shards that match a glob, and those in the folders that do, by their path below its fixed part; and that."""
    parts = pattern.split("/")
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    root = "/".join(parts[:first]) or ("/" if pattern.startswith("/") else os.curdir)
    if storage.is_local(pattern):
        found = {name for path in glob.glob(pattern, recursive=True) for name in _at(path, root)}
        return sorted(found), root
    # Not fsspec's glob, which takes an error of the store for an empty folder.
    try:
        matches = re.compile(glob_translate("/".join(parts[first:]))).match
    except ValueError as error:
        raise UserError(f"{storage.shown(pattern)}: {error}; fix: write ** alone between two slashes") from error
    return [name for name in _inside(root) if any(matches(part) for part in _with_folders(name))], root


def _at(path: str, root: str) -> list[str]:
    """List what is at a local path, or in it, by its path below `root`."""
    below = os.path.relpath(path, root)
    if os.path.isdir(path):
        return [os.path.normpath(os.path.join(below, name)) for name in _inside(path)]
    return [below] if _suffix(path) in (*INPUT_SUFFIXES, SHARD) else []


def _with_folders(name: str) -> Iterable[str]:
    """Yield a path and every folder above it."""
    parts = name.split("/")
    return ("/".join(parts[:length]) for length in range(len(parts), 0, -1))


def _outside(names: Sequence[str], root: str, target: str) -> Sequence[str]:
    """Leave out what lies in a target folder below the source: it was made by this command, and would be enlarged again and again."""
    above, into = (storage.absolute(url).rstrip("/") + "/" for url in (root, target))
    if storage.is_local(root) and storage.is_local(target):
        # A link below the source may lead to the target.
        real = cache(lambda folder: os.path.realpath(folder).rstrip("/") + "/")
        into = real(into)
        return [name for name in names if real(above).startswith(into) or not real(os.path.dirname(above + name)).startswith(into)]
    return [name for name in names if not (above + name).startswith(into)] if into != above and into.startswith(above) else names


def _refuse_file(target: str, source: str, *, into: bool) -> None:
    """Refuse the name of a picture or a shard for what would become a folder, unless it is one or is said to be one."""
    if not into and _suffix(target) in (*INPUT_SUFFIXES, SHARD) and storage.kind(target) is None:
        raise UserError(f"{target}: got suffix {_suffix(target)!r}; expected a folder, because {source} may be many files; fix: {target}/")


def _into_folder(names: Sequence[str], root: str, target: str, nothing: str) -> Work:
    names = _outside(names, root, target)
    if not names:
        raise UserError(f"{nothing}; expected files that end in {', '.join((*INPUT_SUFFIXES, SHARD))}")
    if storage.kind(target) == "file":
        raise UserError(f"{target}: got a file; expected a folder, because {root} is one")
    jobs = tuple(Job(_below(root, name), _below(target, _renamed(name))) for name in names)
    written: dict[str, str] = {}
    for job in jobs:
        if job.target in written:
            both = f"{written[job.target]} and {job.source}"
            raise UserError(f"{job.target}: got {both}; expected one source for each file; fix: rename one of them")
        written[job.target] = job.source
    return Work(jobs, target)


def _renamed(name: str) -> str:
    path = PurePosixPath(name)
    return name if path.suffix.lower() in (*OUTPUT_SUFFIXES, SHARD) else str(path.with_suffix(".png"))
