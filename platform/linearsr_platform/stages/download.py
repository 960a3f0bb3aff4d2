"""One file from a URL or a path to this machine: taken up where it was cut off, checked, and there whole or not at all."""

import fcntl
import hashlib
import json
import os
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from socket import gaierror
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from linearsr_platform import storage
from linearsr_platform.errors import StageError
from linearsr_platform.local import TEMPORARY_MARK
from linearsr_platform.remote import PASSING_STATUS, CutOffError, Patience, tried
from linearsr_platform.stages.weights_manifest import sha256_of

WEB = ("http://", "https://")
PIECE_BYTES = 1 << 20
TIMEOUT_S = 30.0
"""Without a byte from a server, until it is taken to be away."""

PATIENCE = Patience(tries=4, total_s=15.0)
"""Shorter than a run's: somebody is watching, and the command can be repeated."""
RANGE_NOT_SATISFIABLE = 416
PARTIAL = 206

OnBytes = Callable[[int, int], None]
"""Is told how many bytes there are, and how many there will be (0: not known)."""


class _NothingLeftError(OSError):
    """A server has no bytes beyond those that are here."""


class WrongHashError(StageError):
    """A file is not what its publisher says."""


def fetch(url: str, target: Path, *, sha256: str = "", on_bytes: OnBytes = lambda done, total: None) -> str:
    """Bring a file; returns its SHA-256. What was at `target` stays until the new file is whole and right.

    Over HTTP an interrupted download goes on where it was, if the server says that the file is still the same.

    Args:
        url: HTTP address, path, or fsspec URL.
        target: local file.
        sha256: how its hash must begin; "" takes any.
        on_bytes: told of the progress of a download over HTTP.

    Raises:
        FileNotFoundError: if there is no such file.
        WrongHashError: if it has another hash.
        OSError: if the store or the disk fails.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}{TEMPORARY_MARK}download")
    if url.startswith(WEB):
        tried(url, lambda: _download(url, part, on_bytes), patience=PATIENCE)
    else:
        storage.download(url, part)
    found = sha256_of(part)
    if not found.startswith(sha256):
        _forget(part)
        raise WrongHashError(
            f"{storage.shown(url)}: got a file with SHA-256 {found}; expected {sha256}{'...' if len(sha256) < len(found) else ''}; "
            "fix: another source (--from), this one has another file or a damaged one"
        )
    os.replace(part, target)
    _forget(part)
    return found


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Let one process at a time write into a folder.

    Raises:
        StageError: if another one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".prefetch.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StageError(f"{folder}: got another `linearsr prefetch` that writes there; fix: wait for it") from error
        yield


def _download(url: str, part: Path, on_bytes: OnBytes) -> None:
    """Append to `part` what is missing of it, or begin again."""
    try:
        _go_on(url, part, on_bytes)
    except _NothingLeftError:
        _forget(part)
        _go_on(url, part, on_bytes)


def _go_on(url: str, part: Path, on_bytes: OnBytes) -> None:
    version = _version_of(part, url)
    have = part.stat().st_size if version else 0
    # If-Range: a server whose file changed sends the new one whole.
    headers = {"Range": f"bytes={have}-", "If-Range": version} if have else {}
    with _opened(url, headers) as (response, status, answer):
        if status != PARTIAL:
            have = 0
        length = answer.get("Content-Length")
        total = have + int(length) if length is not None else 0
        _remember(part, url, answer)
        with part.open("ab" if have else "wb") as file:
            while piece := response.read(PIECE_BYTES):
                file.write(piece)
                have += len(piece)
                on_bytes(have, total)
    if total and have != total:
        raise CutOffError(f"got {have} bytes; expected {total}")


@contextmanager
def _opened(url: str, headers: dict[str, str]) -> Iterator[tuple[IO[bytes], int, Message]]:
    """Ask for a URL; errors become those that `remote.tried` understands."""
    plain, login = _without_login(url)
    request = Request(plain, headers={"User-Agent": "linearsr", **login, **headers})  # noqa: S310 (the scheme is one of WEB)
    try:
        with build_opener(_Redirects).open(request, timeout=TIMEOUT_S) as response:
            yield response, response.status, response.headers
    except HTTPError as error:
        raise _meant(error)(f"{storage.shown(url)}: HTTP status {error.code}, {error.reason}") from error
    except URLError as error:
        # A name that nobody knows will not be known in a second either.
        kind = OSError if isinstance(error.reason, gaierror) else ConnectionError
        raise kind(f"{storage.shown(url)}: {error.reason}") from error
    except HTTPException as error:
        raise CutOffError(f"{storage.shown(url)}: {type(error).__name__}") from error


class _Redirects(HTTPRedirectHandler):
    """A login is its host's: another one, such as a store that addresses are signed for, is not to see it, and may refuse it."""

    def redirect_request(self, req: Request, *answer: Any) -> Request | None:
        again = super().redirect_request(req, *answer)
        if again is not None and again.host != req.host:
            again.remove_header("Authorization")
        return again


def _without_login(url: str) -> tuple[str, dict[str, str]]:
    """Return a URL without the name and password in it, which `urlopen` takes for a part of the host, and the header that says them."""
    parts = urlsplit(url)
    login, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, {}
    coded = b64encode(unquote(login).encode()).decode()
    return parts._replace(netloc=host).geturl(), {"Authorization": f"Basic {coded}"}


def _meant(error: HTTPError) -> type[OSError]:
    if error.code in (404, 410):
        return FileNotFoundError
    if error.code == RANGE_NOT_SATISFIABLE:
        return _NothingLeftError
    if error.code in (401, 403):
        return PermissionError
    return ConnectionError if error.code in PASSING_STATUS else OSError


def _state(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _version_of(part: Path, url: str) -> str:
    """Return what the server called the version of a part of the same file; "" if there is no part to go on from."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        state = json.loads(_state(part).read_bytes())
        if state["url"] == _name(url) and part.stat().st_size > 0:
            return str(state["version"])
    return ""


def _remember(part: Path, url: str, answer: Message) -> None:
    """Note which version `part` is of; weak tags do not promise the same bytes."""
    tag = answer.get("ETag", "")
    version = tag if tag and not tag.startswith("W/") else answer.get("Last-Modified", "")
    _state(part).write_text(json.dumps({"url": _name(url), "version": version}), encoding="utf-8")


def _name(url: str) -> str:
    """Name a URL without keeping the secrets that it may hold."""
    return hashlib.sha256(url.encode()).hexdigest()


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _state(part).unlink(missing_ok=True)
