"""Folders of the driver's machine brought to workers that cannot see it, through Ray's object store."""

import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ray

CHUNK_BYTES = 64 * 2**20
"""Of a file in one object: neither driver nor worker ever holds more of it in memory of its own."""
REMOVER = 'exec 3<&0; (cat <&3 >/dev/null; rm -rf "$1") & '
"""Shell script that deletes a folder once its standard input ends, which it does with the process that holds the other end, however
that ends. What waits is nobody's child, because Ray ends the children of its workers."""


@dataclass(frozen=True)
class ShippedFolder:
    """A folder's files in the object store; picklable, and good as long as the process that shipped it is connected."""

    files: "Mapping[str, tuple[ray.ObjectRef[bytes], ...]]"
    """Chunks by the path below the folder."""

    def unpack(self) -> Path:
        """Write the folder on this machine; it is deleted when this process ends, also if it is killed.

        Raises:
            OSError: if there is no room for it.
        """
        folder = Path(tempfile.mkdtemp(prefix="linearsr-shipped-"))
        _remove_with_this_process(folder)
        for name, chunks in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for chunk in chunks:
                    file.write(ray.get(chunk))
        return folder


def ship_folder(folder: Path) -> ShippedFolder:
    """Put all files of a folder into the object store of the cluster that this process is connected to."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return ShippedFolder({str(path.relative_to(folder)): tuple(ray.put(chunk) for chunk in _chunks(path)) for path in paths})


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _remove_with_this_process(folder: Path) -> None:
    """Have a folder deleted when this process ends."""
    command = ["/bin/sh", "-c", REMOVER, "sh", str(folder)]
    with subprocess.Popen(  # noqa: S603 (nothing in it is a user's)
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        assert process.stdin is not None  # noqa: S101 (a pipe was asked for)
        # Never closed: the system does that when the process ends.
        os.dup(process.stdin.fileno())
