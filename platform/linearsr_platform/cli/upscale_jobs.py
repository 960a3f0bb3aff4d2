"""Which file becomes which, found out before anything is enlarged: a picture, a folder, a glob, a shard."""

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from linearsr.picture_files import INPUT_SUFFIXES, OUTPUT_SUFFIXES
from linearsr_platform.errors import UserError

SHARD = ".tar"


@dataclass(frozen=True, slots=True)
class Job:
    """One file to read and one to write."""

    source: Path
    target: Path

    @property
    def is_shard(self) -> bool:
        """Tell whether the file is a tar of pictures."""
        return self.source.suffix.lower() == SHARD


@dataclass(frozen=True, slots=True)
class Work:
    """Everything one command does."""

    jobs: tuple[Job, ...]
    single: bool
    """Whether one file was named, so that a mistake in it is the user's."""


def find_work(source: Path, target: Path | None) -> Work:
    """Return what is to be done, with every problem of the arguments found; without a target nothing is to be written.

    Raises:
        UserError: if there is nothing to read, or a target's format cannot be written.
    """
    if target is None:
        several = source.is_dir() or not source.exists()
        target = Path(f"{source.stem}-enlarged") if several else source.with_name(f"{source.stem}-enlarged{_renamed(source).suffix}")
    if source.is_dir():
        return Work(_into_folder(_inside(source), source, target, f"{source}: got a folder without images"), single=False)
    if not source.exists() and glob.has_magic(str(source)):
        found = sorted(Path(name) for name in glob.glob(str(source), recursive=True))
        return Work(_into_folder(_inside_all(found), _fixed_part(source), target, f"{source}: matches no image"), single=False)
    if not source.is_file():
        raise UserError(f"{source}: no such file or folder")
    if source.suffix.lower() == SHARD:
        target = target / source.name if target.is_dir() else target
        if target.suffix.lower() != SHARD:
            raise UserError(f"{target}: got suffix {target.suffix!r}; expected {SHARD}, because {source} is a shard")
        return Work((Job(source, target),), single=True)
    if target.is_dir():
        target = target / _renamed(Path(source.name))
    if target.suffix.lower() not in OUTPUT_SUFFIXES:
        raise UserError(f"{target}: got suffix {target.suffix!r}; expected one of {', '.join(OUTPUT_SUFFIXES)}")
    return Work((Job(source, target),), single=True)


def _inside(folder: Path) -> list[Path]:
    """List pictures and shards at any depth."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in (*INPUT_SUFFIXES, SHARD))


def _inside_all(paths: Iterable[Path]) -> list[Path]:
    """List the pictures and shards among some paths, and those in the folders among them."""
    found = (_inside(path) if path.is_dir() else [path] for path in paths)
    return sorted({path for group in found for path in group if path.suffix.lower() in (*INPUT_SUFFIXES, SHARD)})


def _into_folder(files: list[Path], root: Path, target: Path, nothing: str) -> tuple[Job, ...]:
    if not files:
        raise UserError(f"{nothing}; expected files that end in {', '.join((*INPUT_SUFFIXES, SHARD))}")
    if target.is_file():
        raise UserError(f"{target}: got a file; expected a folder, because {root} is one")
    jobs = tuple(Job(path, target / _renamed(path.relative_to(root))) for path in files)
    written: dict[Path, Path] = {}
    for job in jobs:
        if job.target in written:
            both = f"{written[job.target]} and {job.source}"
            raise UserError(f"{job.target}: got {both}; expected one source for each file; fix: rename one of them")
        written[job.target] = job.source
    return jobs


def _renamed(path: Path) -> Path:
    return path if path.suffix.lower() in (*OUTPUT_SUFFIXES, SHARD) else path.with_suffix(".png")


def _fixed_part(pattern: Path) -> Path:
    """Return the folder before the first part of a glob that is a pattern."""
    parts = pattern.parts
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first]) if first else Path(os.curdir)
