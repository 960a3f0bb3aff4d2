"""Where the members of a tar lie, so that one can be read without the rest. Imports no WebDataset."""

import tarfile
from collections.abc import Callable
from dataclasses import dataclass

from fsspec import AbstractFileSystem

from linearsr_platform import storage
from linearsr_platform.data.tar_index import END
from linearsr_platform.errors import StageError, UserError

BLOCK_BYTES = 1 << 20
"""What is read ahead from a remote tar: many small members come with one request, and large ones are jumped over."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a tar."""

    name: str
    offset: int
    """Of its content, in bytes from the beginning of the tar."""
    size: int
    content: bytes | None = None
    """Its bytes, if they were asked for."""

    @property
    def key(self) -> str:
        """WebDataset's key: its path up to the first dot of its name."""
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.partition(".")[0]


def index_tar(url: str, wanted: Callable[[str], bool]) -> list[Member]:
    """List the files of an uncompressed tar, local or remote, by its headers; those whose name is `wanted` with their content.

    Raises:
        UserError: if it is no such tar, or is cut off.
    """
    try:
        return storage.call(url, lambda fs, path: _members(fs, path, wanted))
    # OverflowError and ValueError: what tarfile makes of sizes and maps of holes that are none.
    except (EOFError, OverflowError, ValueError, tarfile.TarError, FileNotFoundError) as error:
        raise UserError(f"{url}: got a tar that cannot be read: {error}; expected an uncompressed WebDataset tar") from error


def read_part(url: str, offset: int, size: int) -> bytes:
    """Read `size` bytes of a file from `offset` on, and no others.

    Raises:
        FileNotFoundError: if it is not there.
        StageError: if its server sends whole files only.
    """
    part = storage.call(url, lambda fs, path: bytes(fs.cat_file(path, start=offset, end=offset + size)))
    if len(part) > size:
        raise StageError(
            f"{storage.shown(url)}: got {len(part)} bytes; expected {size} from {offset} on: this server sends no parts of files; "
            "fix: copy the tars to a folder, or to a store that does"
        )
    return part


def _members(fs: AbstractFileSystem, path: str, wanted: Callable[[str], bool]) -> list[Member]:
    """Go through a tar once."""
    members = []
    size = int(fs.size(path))
    with fs.open(path, "rb", block_size=BLOCK_BYTES) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        for info in tar:
            if not info.isfile():
                continue
            if info.issparse() or info.size < 0:
                raise EOFError(f"member {info.name} is " + ("sparse" if info.issparse() else f"of size {info.size}"))
            # Headers alone do not show that the last member is cut off.
            if info.offset_data + info.size > size:
                raise EOFError(f"member {info.name} reaches {info.offset_data + info.size - size} bytes past the end")
            file = tar.extractfile(info) if wanted(info.name) else None
            content = None if file is None else file.read()
            members.append(Member(info.name, info.offset_data, info.size, content))
            # tarfile keeps every header it has seen; of a million members that is a gigabyte.
            tar.members.clear()  # type: ignore[attr-defined]
        # tarfile takes a header that is broken or not there for the end; a cut between two members would go unseen.
        stream.seek(tar.offset)
        if stream.read(len(END)) != END:
            raise EOFError(f"it is cut off or damaged at byte {tar.offset}")
    return members
