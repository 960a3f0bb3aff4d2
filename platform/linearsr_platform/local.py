"""What is special about files on this machine: names of unfinished ones."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

TEMPORARY_MARK = ".part-"
"""Part of the name of unfinished files and folders; listings leave them out."""
LONGEST_NAME = 255
"""Bytes of a file's name on most disks."""


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Give a temporary name in the folder of `path`, so that renaming stays on one disk; clean it up whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    end = f"{TEMPORARY_MARK}{uuid4().hex[:8]}{path.suffix}"
    # A name may be as long as the disk allows already.
    room = max(0, LONGEST_NAME - len(os.fsencode(end)))
    temporary = path.with_name(os.fsencode(path.stem)[:room].decode("utf-8", "ignore") + end)
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
