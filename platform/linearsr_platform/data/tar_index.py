"""Tars of samples, mapped into memory: headers are read once, contents only when they are asked for. Imports no torch.

A sample is a run of members with the same path up to the first dot of the file's name; what follows the dot, in lower case, names the
member. That is WebDataset's rule, so its tars and ours are the same thing.
"""

import bz2
import gzip
import lzma
import mmap
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

Place = tuple[int, int]
"""Offset and size of a member's content, bytes."""

BLOCK_BYTES = 512
END = bytes(BLOCK_BYTES)
NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
META = re.compile(r"__[^/]*__($|/)")
"""Members about the tar itself, which WebDataset leaves out."""
UNPACKERS: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ\x00": lzma.decompress,
}
"""By the first bytes of a compressed file."""


class BadTarError(Exception):
    """A file that is no whole tar; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A sample in a tar: where its members are."""

    key: str
    members: dict[str, Place] = field(default_factory=dict)


class TarIndex:
    """The samples of one tar in their order. The file stays mapped, also when it is deleted, until nothing refers to this any more."""

    def __init__(self, path: Path) -> None:
        """Map a file and read its headers. A compressed tar is unpacked into memory.

        Raises:
            OSError: if it cannot be opened.
            BadTarError: if it is cut off or no tar.
        """
        with path.open("rb") as file:
            if not file.seek(0, 2):
                raise BadTarError("the file is empty")
            self._content: mmap.mmap | bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for magic, unpack in UNPACKERS.items():
            if self._content[: len(magic)] == magic:
                try:
                    self._content = unpack(self._content[:])
                except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                    raise BadTarError(f"cannot be unpacked: {error}") from error
        self._view = memoryview(self._content)
        self.entries = list(_grouped(_members(self._content)))

    def view(self, place: Place) -> memoryview:
        """Return the content of a member where it lies, uncopied; it keeps the file mapped."""
        offset, size = place
        return self._view[offset : offset + size]


def _grouped(members: Iterator[tuple[str, Place]]) -> Iterator[Entry]:
    """Put members that follow each other under one key together."""
    entry: Entry | None = None
    for path, place in members:
        match = NAME.fullmatch(path)
        if match is None or META.match(path):
            continue
        key, name = match[1], match[2].lower()
        if entry is None or entry.key != key:
            if entry is not None:
                yield entry
            entry = Entry(key)
        if name in entry.members:
            raise BadTarError(f"sample {key} has two members {name}")
        entry.members[name] = place
    if entry is not None:
        yield entry


def _members(content: mmap.mmap | bytes) -> Iterator[tuple[str, Place]]:
    """Read the headers: path and place of every regular file.

    Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format".
    """
    position, long_name, extra = 0, None, dict[str, str]()
    while True:
        header = content[position : position + BLOCK_BYTES]
        if header == END:
            return
        if len(header) < BLOCK_BYTES:
            # Every tar ends with blocks of zeros: without them a cut between two members would go unseen.
            raise BadTarError(f"it is cut off at {len(content)} bytes")
        _check(header, position)
        kind, size = header[156:157], _size(extra["size"], 10) if "size" in extra else _number(header[124:136])
        start = position + BLOCK_BYTES
        if start + size > len(content):
            raise BadTarError(f"it is cut off at {len(content)} bytes, inside a member of {size} bytes")
        position = start + -(-size // BLOCK_BYTES) * BLOCK_BYTES
        if kind == b"L":
            long_name = _text(content[start : start + size])
        elif kind == b"x":
            extra = _records(content[start : start + size])
        elif kind not in b"gK":
            if kind == b"S" or "GNU.sparse.major" in extra:
                raise BadTarError("it has sparse files")
            if kind in b"0\x007":
                yield extra.get("path") or long_name or _name(header), (start, size)
            long_name, extra = None, {}


def _check(header: bytes, position: int) -> None:
    """Raise if a header's sum does not fit: then it is none."""
    try:
        expected = int(header[148:156].strip(b" \0") or b"-1", 8)
    except ValueError:
        expected = -1
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != expected:
        raise BadTarError(f"it has no header at byte {position}")


def _number(field_bytes: bytes) -> int:
    """Return a size: octal digits, or GNU's binary form for large ones."""
    if field_bytes[0] & 0x80:
        return int.from_bytes(field_bytes[1:], "big")
    return _size(field_bytes.strip(b" \0") or b"0", 8)


def _size(digits: str | bytes, base: int) -> int:
    """Return the number that is written; one below zero would lead back to where reading has been."""
    try:
        size = int(digits, base)
    except ValueError:
        size = -1
    if size < 0:
        raise BadTarError(f"it has a member of size {digits[:20]!r}")
    return size


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _records(raw: bytes) -> dict[str, str]:
    """Return a pax header's records, each `LENGTH KEY=VALUE` and a new line."""
    found = {}
    while raw:
        length, _, _ = raw.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(raw):
            raise BadTarError("it has a broken pax header")
        key, _, value = raw[len(length) + 1 : int(length) - 1].partition(b"=")
        found[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        raw = raw[int(length) :]
    return found
