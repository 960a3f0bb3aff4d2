"""What is special about files on this machine: names of unfinished ones, links to folders, and errors that do not say which file."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

TEMPORARY_MARK = ".part-"
"""Part of the name of unfinished files and folders; listings leave them out."""
TEMPORARY = re.compile(r"\.part-([0-9a-f]{8,32}|download)(\.[^./]*)?(/|$)")
"""Finds the mark in a path as `beside`, downloads and `linearsr` write it: others name finished files so too, `pano.part-1.png`."""
LONGEST_NAME = 255
"""Bytes of a file's name on most disks."""
NAMELESS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a write to an open file fails with where there is no room for it; the error does not say which file that is."""


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Give a temporary name in the folder of `path`, so that renaming stays on one disk; clean it up whatever happens.

    Raises:
        OSError: naming `path` if it is the root of all folders, or the block found no room on its disk.
    """
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    end = f"{TEMPORARY_MARK}{uuid4().hex[:8]}{path.suffix}"
    # A name may be as long as the disk allows already.
    room = max(0, LONGEST_NAME - len(os.fsencode(end)))
    temporary = path.with_name(os.fsencode(path.stem)[:room].decode("utf-8", "ignore") + end)
    try:
        yield temporary
    except OSError as error:
        if error.errno in NAMELESS and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def is_temporary(path: str) -> bool:
    """Tell whether a file or folder is unfinished, or is in a folder that is."""
    return TEMPORARY.search(path) is not None


def files_below(fs: AbstractFileSystem, path: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what a file system knows of every file below a folder; a local one also in folders that are links, as `find` does not.

    Args:
        fs: any file system.
        path: the folder in it.
        above: where the links are that led to it, free of links.

    Raises:
        OSError: if a local folder below cannot be read, whose files `find` would leave out; but not of `lost+found`.
    """
    infos = dict(fs.find(path, detail=True))
    if isinstance(fs, LocalFileSystem):
        for folder, names, _ in os.walk(path, onerror=_raise_unless_gone):
            for link in filter(os.path.islink, (os.path.join(folder, name) for name in sorted(names))):
                infos.pop(link, None)
                way, target = (*above, os.path.realpath(folder)), os.path.realpath(link)
                # A link to a folder above itself has no end.
                if not any(os.path.commonpath((one, target)) == target for one in way):
                    infos |= files_below(fs, link, way)
    return infos


def _raise_unless_gone(error: OSError) -> None:
    # A disk's own folder, which only root reads, at the root of what may be a disk of photographs.
    its_own = os.path.basename(error.filename) == "lost+found"
    if not its_own and not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
