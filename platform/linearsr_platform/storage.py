"""Files behind one interface: a plain path, or a URL of an object store that fsspec knows (`s3://`, `memory://`, ...).

Local paths come back absolute and without `file://`. Every write is whole or absent: local files get a temporary name first,
object stores publish an object only once it is complete. Missing files raise `FileNotFoundError`, as `open` does.

Stores behind a network throttle and drop connections; such calls are tried again for half a minute (`linearsr_platform.remote`).
`memory://` is the memory of one process: fine in a test, of no use between a command and its workers.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from fsspec import AbstractFileSystem
from fsspec.config import conf
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from linearsr_platform.errors import UserError
from linearsr_platform.local import beside, files_below, is_temporary
from linearsr_platform.remote import CutOffError, shown, tried
from linearsr_platform.scratch import scratch_folder

__all__ = [
    "absolute",
    "atomic_file",
    "atomic_folder",
    "call",
    "copy_file",
    "copy_tree",
    "download",
    "exists",
    "filesystem",
    "is_local",
    "is_shared",
    "join",
    "kind",
    "list_files",
    "list_folders",
    "local_path",
    "name_of",
    "parent",
    "read_bytes",
    "read_json",
    "read_text",
    "remove",
    "shown",
    "size_and_version",
    "write_bytes",
    "write_json",
    "write_text",
]

T = TypeVar("T")

S3 = ("s3://", "s3a://")
S3_TRIES = 2
"""Of s3fs for one call, under those of `remote.tried`."""
VERSIONS = ("ETag", "etag", "md5Hash", "version_id", "LastModified", "last_modified", "mtime", "created")
"""What file systems say about a file that changes with its content, the best first."""


def is_local(url: str) -> bool:
    """Tell whether a URL is a path on this machine."""
    return "://" not in url or url.startswith(("file://", "local://"))


def is_shared(url: str) -> bool:
    """Tell whether other processes see the same files under a URL: not those of `memory://`."""
    return not url.startswith("memory://")


def absolute(url: str, folder: str | None = None) -> str:
    """Return a URL unchanged and a path absolute, relative ones taken from `folder` (default: the working directory).

    `folder` may itself be a URL. `~` is the home folder.

    Raises:
        UserError: if no file can have that name.
    """
    if not is_local(url):
        return url
    try:
        path = Path(url.removeprefix("file://").removeprefix("local://")).expanduser()
        named = b"\0" not in os.fsencode(path)
    except (RuntimeError, UnicodeEncodeError):
        named = False
    if not named:
        raise UserError(f"storage: got {url!r}; expected the path of a file or folder; fix: check ~ and characters that no name can have")
    if folder is not None and not path.is_absolute():
        return join(folder, str(path))
    return os.path.abspath(path)


def join(url: str, *parts: str) -> str:
    """Append path parts to a URL or path; a local result is absolute."""
    if is_local(url):
        return os.path.abspath(os.path.join(absolute(url), *parts))
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def name_of(url: str) -> str:
    """Return the last part of a URL or path."""
    return url.rstrip("/").rsplit("/", 1)[-1]


def parent(url: str) -> str:
    """Return the folder a file or folder is in."""
    return os.path.dirname(absolute(url)) if is_local(url) else url.rstrip("/").rsplit("/", 1)[0]


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """Open the file system of a URL; returns it with the path inside it.

    Listings are never cached: another process may write at any time.

    Raises:
        UserError: if the scheme is unknown or its package is not installed.
    """
    if is_local(url):
        # fsspec would read `::` in a name as a chain of file systems.
        return LocalFileSystem(), absolute(url)
    try:
        urlsplit(url)
        fs, path = url_to_fs(url, use_listings_cache=False, **_options(url))
    except (ImportError, ValueError) as error:
        got = f"storage: got {shown(url)!r}"
        raise UserError(f"{got}; expected a path or a URL that fsspec can open; fix: {shown(str(error))}") from None
    if url.startswith(S3):
        fs.retries = S3_TRIES
    return fs, path


def _options(url: str) -> dict[str, Any]:
    """Return what a file system needs beside its URL: requests to S3 are tried thrice, the rest is left to `remote.tried`.

    Twenty-five tries, which botocore and s3fs make of one call together, would take minutes to say that a store is gone.
    """
    if not url.startswith(S3):
        return {}
    settings: dict[str, Any] = conf.get("s3", {}).get("config_kwargs", {})
    return {"config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 3}} | settings}


def call(url: str, action: Callable[[AbstractFileSystem, str], T]) -> T:
    """Do something with the file system and path of a URL; if it is remote it may be done several times, until it goes well."""
    fs, path = filesystem(url)
    return action(fs, path) if isinstance(fs, LocalFileSystem) else tried(url, lambda: action(fs, path))


def exists(url: str) -> bool:
    """Tell whether a file or folder is there."""
    return call(url, look) is not None


def look(fs: AbstractFileSystem, path: str) -> dict[str, Any] | None:
    """Return what a file system knows of a file or folder, by the keys `type`, `size` and its own; None if it is not there.

    Not `exists`, `isdir` and `isfile`, which in some file systems take any error for a no.
    """
    try:
        return dict(fs.info(path))
    except (FileNotFoundError, NotADirectoryError):
        return None


def kind(url: str) -> Literal["file", "folder"] | None:
    """Tell what is there; None if nothing is."""
    there = call(url, look)
    return None if there is None else "folder" if there["type"] == "directory" else "file"


def size_and_version(url: str) -> tuple[int, str]:
    """Return a file's bytes, and a text that changes when its store says that the content did.

    Raises:
        FileNotFoundError: if it is not there.
    """
    info: dict[str, Any] = call(url, lambda fs, path: dict(fs.info(path)))
    return int(info["size"]), next((f"{name} {info[name]}" for name in VERSIONS if info.get(name)), "")


def download(url: str, target: Path) -> None:
    """Copy a file to a local path, whole; what was there before is gone. May leave a part of it after an error.

    Raises:
        FileNotFoundError: if it is not there.
    """
    call(url, lambda fs, path: _get(fs, path, target))


def _get(fs: AbstractFileSystem, path: str, target: Path) -> None:
    """Get one file and compare its size."""
    target.unlink(missing_ok=True)
    fs.get_file(path, str(target))
    got, expected = target.stat().st_size, int(fs.info(path)["size"])
    if got != expected:
        raise CutOffError(f"got {got} bytes; expected {expected}")


def read_bytes(url: str) -> bytes:
    """Read a whole file.

    Raises:
        FileNotFoundError: if it is not there.
    """
    return call(url, lambda fs, path: bytes(fs.cat_file(path)))


def read_text(url: str) -> str:
    """Read a whole UTF-8 file."""
    return read_bytes(url).decode("utf-8")


def read_json(url: str) -> object:
    """Read a JSON file.

    Raises:
        FileNotFoundError: if it is not there.
        UserError: if it is not JSON.
    """
    try:
        value: object = json.loads(read_bytes(url))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shown(url)}: expected a JSON file: {error}; fix: delete it and run the stage that writes it again") from error
    return value


def write_bytes(url: str, content: bytes) -> None:
    """Write a whole file at once, replacing any; parent folders are made."""
    with atomic_file(url) as path:
        path.write_bytes(content)


def write_text(url: str, content: str) -> None:
    """Write a whole UTF-8 file at once."""
    write_bytes(url, content.encode("utf-8"))


def write_json(url: str, value: object) -> None:
    """Write a value as indented JSON, keys in their own order.

    Raises:
        ValueError: if it holds NaN or infinity, which JSON has no word for.
    """
    write_text(url, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


@contextmanager
def atomic_file(url: str) -> Iterator[Path]:
    """Give a local path to write to; the file appears at `url` when the block ends well, and not at all otherwise.

    The path keeps the suffix of `url`, because image and archive writers look at it.
    """
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        with beside(Path(path)) as temporary:
            yield temporary
            os.replace(temporary, path)
        return
    with scratch_folder() as folder:
        temporary = folder / name_of(url)
        yield temporary
        tried(url, lambda: fs.put_file(str(temporary), path))


@contextmanager
def atomic_folder(url: str) -> Iterator[Path]:
    """Give an empty local folder to fill; it replaces `url` when the block ends well, and changes nothing otherwise.

    On a remote store files arrive one by one, so write last, by itself, the file that says the folder is complete.
    """
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        with beside(Path(path)) as temporary:
            temporary.mkdir()
            yield temporary
            with beside(Path(path)) as previous:
                if os.path.exists(path):
                    os.replace(path, previous)
                os.replace(temporary, path)
        return
    with scratch_folder() as folder:
        yield folder
        _upload_tree(folder, url)


@contextmanager
def local_path(url: str) -> Iterator[Path]:
    """Give a local path to read a file or folder; a remote one is downloaded and removed again at the end.

    Raises:
        FileNotFoundError: if there is nothing at `url`.
    """
    fs, path = filesystem(url)
    if not exists(url):
        raise FileNotFoundError(f"{shown(url)} does not exist")
    if isinstance(fs, LocalFileSystem):
        yield Path(path)
        return
    with scratch_folder() as folder:
        target = folder / name_of(url)
        _download(url, target)
        yield target


def list_files(url: str, pattern: str = "*") -> list[str]:
    """List the URLs of all finished files under a folder, at any depth, in order of name; [] if there is no such folder.

    Args:
        url: a folder.
        pattern: shell pattern on the path below `url`; `*` also crosses folders, so `*.tar` finds every tar.
    """
    _, path = filesystem(url)
    root = path.rstrip("/")
    everything: list[str] = call(url, lambda fs, path: list(files_below(fs, path)))
    below = (found[len(root) :].lstrip("/") for found in everything if found.startswith(f"{root}/"))
    return [join(url, name) for name in sorted(below) if not is_temporary(name) and fnmatch(name, pattern)]


def list_folders(url: str) -> list[str]:
    """List the URLs of the folders directly inside a folder, in order of name; [] if there is no such folder."""
    if kind(url) != "folder":
        return []
    entries: list[dict[str, Any]] = call(url, lambda fs, path: list(fs.ls(path, detail=True)))
    names = (name_of(entry["name"]) for entry in entries if entry["type"] == "directory")
    return [join(url, name) for name in sorted(names) if not is_temporary(name)]


def remove(url: str) -> None:
    """Delete a file or a folder with all that is in it; nothing there is fine."""
    call(url, _remove)


def _remove(fs: AbstractFileSystem, path: str) -> None:
    """Delete what is there; a second try may find that the first did it, or a part of it."""
    if look(fs, path) is not None:
        fs.rm(path, recursive=True)


def copy_file(source: str, target: str) -> None:
    """Copy one file between any two places, whole or not at all."""
    with local_path(source) as path, atomic_file(target) as temporary:
        shutil.copyfile(path, temporary)


def copy_tree(source: str, target: str) -> None:
    """Make `target` a copy of the folder `source`, between any two places; files only `target` had are gone afterwards.

    A local target is replaced in one step.

    Raises:
        FileNotFoundError: if `source` is not there.
    """
    with local_path(source) as folder:
        if is_local(target):
            with atomic_folder(target) as temporary:
                shutil.copytree(folder, temporary, dirs_exist_ok=True)
        else:
            _upload_tree(folder, target)


def _upload_tree(folder: Path, url: str) -> None:
    """Put every file of a local folder under `url`, then delete what else was there."""
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    for name in names:
        _upload(folder / name, join(url, name))
    kept = {join(url, name) for name in names}
    for file in list_files(url):
        if file not in kept:
            remove(file)


def _upload(source: Path, url: str) -> None:
    call(url, lambda fs, path: fs.put_file(str(source), path))


def _download(url: str, target: Path) -> None:
    """Get a remote file, or every file of a remote folder."""
    # Not `isfile`, which takes any error for a no: a file that could not be asked for just then would be taken for a folder.
    if call(url, lambda fs, path: bool(fs.info(path)["type"] == "file")):
        download(url, target)
        return
    target.mkdir(parents=True)
    for file in list_files(url):
        local = target / file.removeprefix(url.rstrip("/")).lstrip("/")
        local.parent.mkdir(parents=True, exist_ok=True)
        download(file, local)
