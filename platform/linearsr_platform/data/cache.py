"""Remote shards as local files, in one bounded folder that all processes of a machine share. Imports no torch.

Every file has a lock beside it: shared while it is in use, exclusive while it is fetched or deleted. Locks are `flock`s, which the
kernel releases when a process dies, so a crash leaves none behind; what it had fetched in part is deleted by the next who needs room.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue

from linearsr_platform import storage
from linearsr_platform.errors import StageError, UserError

FILE, PARTIAL, ROOM, LOCK = ".tar", ".part", ".room", ".lock"
"""A shard; one that is being fetched; an empty file as large as that will be, which keeps its room; and the lock of all three."""
SPACE = "space.lock"
"""Held while room is made, so that two processes never count the same room as theirs."""
ROOM_WAIT_S, LOOK_S = 120.0, 0.1
CHUNK_BYTES = 1 << 20
log = logging.getLogger(__name__)


def default_folder() -> str:
    """Return this user's cache in the system's folder for temporary files."""
    return os.path.join(tempfile.gettempdir(), f"linearsr-cache-{os.getuid()}")


class CachedFile:
    """A file in the cache that is not deleted while this object lives."""

    def __init__(self, path: Path, lock: int) -> None:
        """Take over a file descriptor that holds the file's lock."""
        self.path = path
        self._lock = lock

    def close(self) -> None:
        """Allow that the file is deleted; what is mapped stays readable."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __del__(self) -> None:
        self.close()


class ShardCache:
    """Fetches whole shards into a folder and deletes those not used for longest. Safe for many processes at once."""

    def __init__(
        self, folder: str | None = None, *, max_bytes: int, sha256: Mapping[str, str] | None = None, room_wait_s: float = ROOM_WAIT_S
    ) -> None:
        """Make the folder, for this user alone.

        Args:
            folder: None is `default_folder`.
            max_bytes: of all shards in the folder, those being fetched included.
            sha256: hashes that some shards must have, by URL.
            room_wait_s: how long to wait while everything in the folder is in use.

        Raises:
            UserError: if the folder is not this user's own.
        """
        self._folder = Path(default_folder() if folder is None else storage.absolute(folder))
        self._max_bytes, self._sha256, self._room_wait_s = max_bytes, dict(sha256 or {}), room_wait_s
        self._known: dict[str, tuple[str, int]] = {}
        self._wanted: SimpleQueue[str | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self._folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            rule = "a folder of your own that nobody else may write to"
            raise UserError(f"data.cache_folder: got {self._folder}; expected {rule}; fix: chmod 700, or another folder")

    def open(self, url: str) -> CachedFile:
        """Return a shard as a local file, fetched if it is not there. Of several processes that need it one fetches, and all wait.

        Raises:
            FileNotFoundError: if the store has no such shard.
            StageError: if it comes with another hash than it must have, or does not fit because everything else is in use.
            UserError: if it is larger than the whole cache.
        """
        held = self._open(url, time.monotonic() + self._room_wait_s)
        if held is None:
            bound, free = f"{self._max_bytes / 1e9:g} GB", shutil.disk_usage(self._folder).free / 1e9
            fix = "fix: a larger data.cache_gb, or data.cache_folder on a larger disk; each reading process needs room for three shards"
            got = f"all of its {bound} is in use, or its disk is full ({free:.3g} GB free)"
            raise StageError(f"shard cache {self._folder}: no room for {storage.shown(url)}: {got}; {fix}")
        return held

    def prefetch(self, url: str) -> None:
        """Fetch a shard in the background if there is room; what goes wrong is left to `open` to say."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._fetch_wanted, name="linearsr-prefetch", daemon=True)
            self._thread.start()
        self._wanted.put(url)

    def close(self) -> None:
        """End the background fetching, after the shard that is being fetched."""
        if self._thread is not None:
            self._wanted.put(None)
            self._thread.join()
            self._thread = None

    def _fetch_wanted(self) -> None:
        while (url := self._latest()) is not None:
            try:
                held = self._open(url, 0.0)
            except (OSError, StageError, UserError) as error:
                log.info("shard cache: %s was not fetched ahead: %s", storage.shown(url), storage.shown(str(error)))
            else:
                if held is not None:
                    held.close()

    def _latest(self) -> str | None:
        """Wait for a wish and return it; the end overtakes all wishes."""
        wishes = [self._wanted.get()]
        while True:
            try:
                wishes.append(self._wanted.get_nowait())
            except Empty:
                break
        if None in wishes:
            return None
        for wish in wishes[1:]:
            self._wanted.put(wish)
        return wishes[0]

    def _open(self, url: str, deadline: float) -> CachedFile | None:
        """Return a shard; None if there was no room until the deadline."""
        name, size = self._identity(url)
        path, lock_path = self._folder / f"{name}{FILE}", self._folder / f"{name}{LOCK}"
        while True:
            lock = _locked(lock_path, fcntl.LOCK_SH)
            if _is_whole(path, size):
                os.utime(path)
                return CachedFile(path, lock)
            os.close(lock)
            lock = _locked(lock_path, fcntl.LOCK_EX)
            try:
                if not _is_whole(path, size) and not self._fetch(url, path, size, deadline):
                    return None
            finally:
                # Closing and locking anew lets others in between; then the loop looks again.
                os.close(lock)

    def _identity(self, url: str) -> tuple[str, int]:
        """Return the name of a shard's file in the cache, and its size: one that changed in the store is another."""
        if url not in self._known:
            size, version = storage.size_and_version(url)
            self._known[url] = (hashlib.sha256(f"{url}\n{size}\n{version}".encode()).hexdigest()[:32], size)
        return self._known[url]

    def _fetch(self, url: str, path: Path, size: int, deadline: float) -> bool:
        """Fetch a shard whose lock is held; False if there is no room for it until the deadline."""
        partial, room = path.with_suffix(PARTIAL), path.with_suffix(ROOM)
        if not self._reserve(room, size, url, deadline):
            return False
        try:
            storage.download(url, partial)
            _compare(url, partial, self._sha256.get(url))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
            room.unlink(missing_ok=True)
        return True

    def _reserve(self, room: Path, size: int, url: str, deadline: float) -> bool:
        """Make room and take it by an empty file of the final size."""
        if size > self._max_bytes:
            got = f"data.cache_gb: got {self._max_bytes / 1e9:g}"
            raise UserError(f"{got}; expected at least {2 * size / 1e9:g}: {storage.shown(url)} has {size} bytes; fix: raise it")
        while True:
            with self._space():
                if self._make_room(size, room):
                    with room.open("wb") as file:
                        file.truncate(size)
                    return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(LOOK_S)

    @contextmanager
    def _space(self) -> Iterator[None]:
        lock = _locked(self._folder / SPACE, fcntl.LOCK_EX)
        try:
            yield
        finally:
            os.close(lock)

    def _make_room(self, size: int, own: Path) -> bool:
        """Delete what a crash left, and then the files not used for longest, until `size` fits; what is in use stays."""
        own.unlink(missing_ok=True)
        files: list[tuple[float, int, Path]] = []
        fetched = 0
        for path in self._folder.iterdir():
            if path.suffix in (FILE, PARTIAL, ROOM):
                try:
                    found = path.stat()
                except FileNotFoundError:  # fetched or given up meanwhile
                    continue
                fetched += found.st_size if path.suffix == PARTIAL else 0
                # What is being fetched grows, and begins anew when the connection breaks: the room kept for it counts instead.
                files.append((found.st_mtime if path.suffix == FILE else 0.0, 0 if path.suffix == PARTIAL else found.st_size, path))
        room = self._max_bytes - sum(file_size for _, file_size, _ in files) - size
        # What others have reserved and not written yet is free on the disk, and not for this one.
        promised = sum(file_size for _, file_size, path in files if path.suffix == ROOM) - fetched
        room = min(room, shutil.disk_usage(self._folder).free - promised - size)
        for _, file_size, path in sorted(files):
            # What is not whole, and nobody holds the lock of, is of a process that died.
            if (room < 0 or path.suffix != FILE) and self._delete(path):
                room += file_size
        return room >= 0

    def _delete(self, path: Path) -> bool:
        """Delete a file and its lock, unless somebody uses it."""
        try:
            lock = _locked(path.with_suffix(LOCK), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        try:
            path.unlink(missing_ok=True)
            path.with_suffix(LOCK).unlink(missing_ok=True)
        finally:
            os.close(lock)
        return True


def _locked(path: Path, kind: int) -> int:
    """Lock a file, made if need be, and return the descriptor that holds the lock.

    Raises:
        BlockingIOError: if `kind` says not to wait, and another holds it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, kind)
            # Who deleted the file while this waited has left a lock on nothing.
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _is_whole(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _compare(url: str, path: Path, expected: str | None) -> None:
    """Raise if a fetched file has not the hash it must have."""
    if expected is None:
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            digest.update(piece)
    if digest.hexdigest() != expected:
        raise StageError(
            f"shard {storage.shown(url)}: got sha256 {digest.hexdigest()}; expected {expected} as in its manifest; "
            "fix: run the stage `prepare` again"
        )
