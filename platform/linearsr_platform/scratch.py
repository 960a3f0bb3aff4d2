"""Folders for what is on its way to or from a store, which do not outlive a process that is killed for long.

A process holds a lock in each of its folders. A folder whose lock is free belongs to nobody any more; the kernel frees the locks of a
killed process, and unlike process numbers they mean the same in all containers that share a disk.
"""

import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "linearsr-scratch-"
LOCK = ".lock"
YOUNG_S = 60.0
"""Age below which a folder without a lock may be one that is just being made."""
log = logging.getLogger(__name__)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give an empty folder on this machine that is deleted at the end, or by `remove_abandoned` if this process is killed."""
    while True:
        root = Path(tempfile.mkdtemp(prefix=PREFIX))
        lock = _locked(root)
        if lock is not None:
            break
    try:
        folder = root / "files"
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(root, ignore_errors=True)
        os.close(lock)


def remove_abandoned() -> int:
    """Delete the folders that processes of this user left here when they were killed, and return how many."""
    found = 0
    for root in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            facts = root.stat()
            if facts.st_uid != os.getuid() or (not (root / LOCK).exists() and time.time() - facts.st_mtime < YOUNG_S):
                continue
            lock = _locked(root)
        except FileNotFoundError:
            continue
        if lock is not None:
            shutil.rmtree(root, ignore_errors=True)
            os.close(lock)
            found += 1
    if found:
        log.info("removed %d folders of temporary files that killed processes left in %s", found, tempfile.gettempdir())
    return found


def _locked(root: Path) -> int | None:
    """Return the descriptor that holds a folder's lock, or None if another process has it.

    Raises:
        FileNotFoundError: if the folder is gone.
    """
    descriptor = os.open(root / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
