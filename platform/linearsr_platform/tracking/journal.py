"""The journal of an outbox: every write that MLflow has not taken yet, on this machine's disk, so that it outlives the process."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

from linearsr_platform import storage
from linearsr_platform.tracking.operations import Operation

OUTBOX = "outbox"
"""Folder of the journals inside a run's."""
LINES = "operations.jsonl"
SHRINK_BYTES = 1 << 20
"""A journal of which everything was sent is emptied once it is this long."""


class Journal:
    """Operations in order, one line each, and how many of them were sent. Belongs to one process, which holds a lock on it.

    A line is in the hands of the operating system before its operation is sent, so it outlives the process; `durable` lines outlive
    the machine too. What is sent is never waited for twice: a line says up to where the others are done.
    """

    def __init__(self, folder: Path, descriptor: int, uri: str) -> None:
        """Write to a folder whose file of lines is open and locked; use `create` or `orphans`."""
        self.folder, self.uri = folder, uri
        self._descriptor = descriptor
        self._last = self._sent = 0

    @classmethod
    def create(cls, parent: Path, uri: str) -> "Journal":
        """Start an empty one in a folder of its own; `uri` is the store that it is for, without a password."""
        folder = parent / f"{datetime.now():%Y%m%d-%H%M%S}-{uuid4().hex[:8]}"
        folder.mkdir(parents=True)
        journal = cls(folder, _locked(folder / LINES, create=True), uri)
        journal._write({"uri": uri})
        return journal

    @classmethod
    def orphans(cls, parent: Path) -> Iterator[tuple["Journal", list[tuple[int, Operation]]]]:
        """Take over the journals that no process holds, oldest first, each with what is still to be sent; empty ones are removed."""
        for lines in sorted(parent.glob(f"*/{LINES}")):
            try:
                descriptor = _locked(lines, create=False)
            except (BlockingIOError, FileNotFoundError):
                # Its process lives, or has just removed it.
                continue
            uri, numbered, sent = _read(lines)
            journal = cls(lines.parent, descriptor, uri)
            # Ends a line that was cut short.
            os.write(descriptor, b"\n")
            journal._last, journal._sent = max([sent, *numbered]), sent
            left = [(number, operation) for number, operation in sorted(numbered.items()) if number > sent]
            if left:
                yield journal, left
            else:
                journal.close()

    def append(self, operation: Operation, source: Path | bytes | None, *, durable: bool) -> int:
        """Keep an operation, and a copy of its file; return its number, from 1.

        Raises:
            OSError: if the disk takes it not.
        """
        number = self._last + 1
        if source is not None:
            copy = self.file(number, operation)
            copy.parent.mkdir()
            if isinstance(source, bytes):
                copy.write_bytes(source)
            else:
                shutil.copyfile(source, copy)
        self._write({"number": number, **operation.to_json()})
        if durable:
            os.fsync(self._descriptor)
        self._last = number
        return number

    def file(self, number: int, operation: Operation) -> Path:
        """Return where the bytes of an operation's file are."""
        return self.folder / f"{number:08d}" / (operation.file or "none")

    def mark_sent(self, number: int) -> None:
        """Note that this operation and all before it need not be sent again."""
        self._sent = number
        if self._sent == self._last and os.fstat(self._descriptor).st_size > SHRINK_BYTES:
            os.ftruncate(self._descriptor, 0)
            self._write({"uri": self.uri})
        self._write({"sent": number})
        shutil.rmtree(self.folder / f"{number:08d}", ignore_errors=True)

    def release(self) -> None:
        """Let go of it and leave it as it is."""
        os.close(self._descriptor)

    def close(self) -> None:
        """Let go of it; if everything was sent, it goes away."""
        if self._sent == self._last:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):
                # Not empty: other journals.
                self.folder.parent.rmdir()
        os.close(self._descriptor)

    def _write(self, line: dict[str, object]) -> None:
        os.write(self._descriptor, json.dumps(line, separators=(",", ":")).encode() + b"\n")


def outbox_folder(storage_url: str, name: str) -> Path:
    """Return where the journals of a run of this name lie: in its folder, or on this machine if its storage is remote."""
    return Path(storage.join(storage_url, name, OUTBOX)) if storage.is_local(storage_url) else _local_folder(storage_url) / name


def outbox_folders(storage_url: str) -> list[Path]:
    """Return every folder under a storage root, or on this machine for a remote one, that holds journals."""
    pattern, root = (
        (f"*/{OUTBOX}", Path(storage.absolute(storage_url))) if storage.is_local(storage_url) else ("*", _local_folder(storage_url))
    )
    return sorted(folder for folder in root.glob(pattern) if any(folder.glob(f"*/{LINES}")))


def _local_folder(storage_url: str) -> Path:
    mine = Path(tempfile.gettempdir(), f"linearsr-outbox-{os.getuid()}")
    mine.mkdir(mode=0o700, exist_ok=True)
    return mine / sha256(storage_url.rstrip("/").encode()).hexdigest()[:16]


def _locked(lines: Path, *, create: bool) -> int:
    """Open a file of lines for appending and lock it for this process's life.

    Raises:
        BlockingIOError: if another process holds it.
        FileNotFoundError: if it is not there.
    """
    descriptor = os.open(lines, os.O_RDWR | os.O_APPEND | (os.O_CREAT if create else 0), 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    return descriptor


def _read(lines: Path) -> tuple[str, dict[int, Operation], int]:
    """Return the store's URI, operations by number, and the number up to which they were sent; one cut short or damaged is no line."""
    uri, numbered, sent = "", dict[int, Operation](), 0
    for line in lines.read_bytes().splitlines():
        try:
            value = json.loads(line)
            if "number" in value:
                number = int(value.pop("number"))
                numbered[number] = Operation.from_json(value)
            uri, sent = str(value.get("uri", uri)), max(sent, int(value.get("sent", 0)))
        except (AttributeError, OverflowError, RecursionError, TypeError, ValueError):
            continue
    return uri, numbered, sent
