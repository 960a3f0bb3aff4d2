"""What is special about stores behind a network: faults that pass are waited out, and secrets in URLs are never shown."""

import errno
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)

FINAL = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
"""Errors that another try gets again."""
PASSING_ERRNOS = frozenset(
    # s3fs gives EBUSY for "SlowDown" and 503, and EREMOTEIO for 500.
    (errno.EBUSY, errno.EREMOTEIO, errno.EAGAIN, errno.EPIPE, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ETIMEDOUT, errno.ECONNRESET)
)
PASSING_STATUS = frozenset((408, 429, 500, 502, 503, 504))
PASSING_CODES = frozenset(
    ("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "RequestTimeout", "IncompleteBody",
     "BadDigest", "InternalError", "ServiceUnavailable")
)  # fmt: skip
PASSING_NAMES = frozenset(
    # Of botocore, aiohttp and http.client by name: not every installation has each of them.
    ("HTTPClientError", "EndpointConnectionError", "ResponseParserError", "ClientPayloadError", "ClientConnectionError", "IncompleteRead")
)

USER = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s@'\"]+@")
QUERY = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*://[^\s?'\"]*)\?(?=[^\s'\"]*=)[^\s'\"]+")
SECRET = re.compile(r"(?i)((?:secret|token|password|passwd|signature|access_?key)[\w-]*['\"]?\s*[=:]\s*['\"]?)[^\s'\",;&]+")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a store is given to recover."""

    tries: int = 6
    first_wait_s: float = 0.2
    """Before the second try; doubles with every other one, and a random part up to a half is left out."""
    longest_wait_s: float = 8.0
    total_s: float = 30.0
    """No try begins later than this after the first."""


PATIENCE = Patience()


class CutOffError(ConnectionError):
    """A file came shorter than its store says it is."""


def without_logins(text: str) -> str:
    """Return a text with what stands before an `@` in its URLs left out."""
    return USER.sub(r"\1***@", text)


def shown(text: str) -> str:
    """Return a URL, or a text with URLs in it, without user names, passwords and keys: for messages and logs."""
    return SECRET.sub(r"\1***", QUERY.sub(r"\1?***", without_logins(text)))


def passes(error: BaseException) -> bool:
    """Tell whether another try may well succeed: throttling, a server's own fault, a dropped connection or a timeout."""
    for one in _chain(error):
        if isinstance(one, FINAL):
            return False
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            if response.get("Error", {}).get("Code") in PASSING_CODES:
                return True
            if response.get("ResponseMetadata", {}).get("HTTPStatusCode") in PASSING_STATUS:
                return True
        if isinstance(one, ConnectionError | TimeoutError) or getattr(one, "status", None) in PASSING_STATUS:
            return True
        if isinstance(one, OSError) and one.errno in PASSING_ERRNOS:
            return True
        if any(kind.__name__ in PASSING_NAMES for kind in type(one).__mro__):
            return True
    return False


def tried(
    url: str,
    action: Callable[[], T],
    *,
    patience: Patience = PATIENCE,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> T:
    """Return what `action` returns, tried again while what goes wrong may pass. Every new try is logged.

    Args:
        url: what it is about; shown without secrets.
        action: may be called several times.
        patience: how often and how long.
        sleep: waits some seconds.
        clock: seconds that only ever rise.

    Raises:
        OSError: what `action` raised last, without secrets in its message; also where a store's client raises errors of its own.
    """
    attempt = _Attempt(url, patience, clock)
    wait_s = patience.first_wait_s
    while True:
        with attempt:
            return action()
        sleep(wait_s * (1 - secrets.SystemRandom().random() / 2))
        wait_s = min(2 * wait_s, patience.longest_wait_s)


class _Attempt:
    """Swallows an error of its block if it may pass and there is patience left; shows others without secrets."""

    def __init__(self, url: str, patience: Patience, clock: Callable[[], float]) -> None:
        self._url, self._patience, self._clock = url, patience, clock
        self._started, self._number = clock(), 0

    def __enter__(self) -> None:
        self._number += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is None:
            return False
        patient = self._number < self._patience.tries and self._clock() - self._started < self._patience.total_s
        if patient and isinstance(error, Exception) and passes(error):
            log.warning("%s: try %d of %d failed: %s", shown(self._url), self._number, self._patience.tries, _reason(error))
            return True
        if self._number > 1:
            error.add_note(f"{shown(self._url)}: given up after {self._number} tries")
        plain = _plain(error)
        if plain is error:
            return False
        for note in getattr(error, "__notes__", []):
            plain.add_note(note)
        raise plain from None


def _plain(error: BaseException) -> BaseException:
    """Return an error as an `OSError` of the same meaning whose message can be shown; itself if it is one, or none of a store's."""
    text = shown(str(error))
    if isinstance(error, OSError):
        if text == str(error):
            return error
        # Without its number or its cause, nothing else would tell that it may pass.
        otherwise = ConnectionError if passes(error) else OSError
        return next((kind for kind in (*FINAL, TimeoutError, ConnectionError) if isinstance(error, kind)), otherwise)(text)
    if isinstance(error, Exception) and passes(error):
        return ConnectionError(text)
    names = {kind.__name__ for kind in type(error).__mro__}
    if not names & {"BotoCoreError", "ClientError"}:
        return error
    return PermissionError(text) if "Credentials" in type(error).__name__ else OSError(text)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(shown(str(error)).split())}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised from."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__
