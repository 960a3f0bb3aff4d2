"""Where MLflow keeps its records: the default place, whether it can be reached, and a client for it."""

import http.client
import logging
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from linearsr_platform import storage
from linearsr_platform.errors import StageError, UserError
from linearsr_platform.tracking.failures import first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""Port of a database server whose URI names none."""

SQLITE_FILE = "mlflow.db"
"""Name of the default store under a storage root."""

HOW_TO_START = (
    "start one with `mlflow server --backend-store-uri sqlite:///mlflow.db --port 5000`, or unset tracking.uri to use a local file"
)


def default_uri(storage_root: str) -> str:
    """Return the URI of the SQLite file that holds the records of a storage root.

    Raises:
        UserError: if the storage root is remote: SQLite needs a local disk.
    """
    if not storage.is_local(storage_root):
        raise UserError(
            f"tracking.uri: got nothing; expected a URI, because storage {storage_root!r} is remote and SQLite needs a local disk; "
            "fix: set tracking.uri to an MLflow server, as in --set tracking.uri=http://HOST:5000"
        )
    return f"sqlite:///{storage.join(storage_root, SQLITE_FILE)}"


def default_artifact_root(storage_root: str) -> str:
    """Return the URL under which runs of a storage root keep their files."""
    root = storage.join(storage_root, "mlartifacts")
    return Path(root).as_uri() if storage.is_local(root) else root


def answers(uri: str, *, timeout_s: float = 2.0) -> bool:
    """Tell whether a tracking URI answers now; see `check_reachable`."""
    try:
        check_reachable(uri, timeout_s=timeout_s)
    except UserError:
        return False
    return True


def check_reachable(uri: str, *, timeout_s: float = 3.0) -> None:
    """Return if a tracking URI answers; imports no MLflow, so it is cheap enough to run before anything else.

    A SQLite file answers if its folder can be made, a server if `/health` does, a database if its port is open; other schemes
    belong to MLflow plugins and are left to them.

    Raises:
        UserError: naming the URI and what to do, if it does not.
    """
    address = _parts(uri)
    scheme = address.scheme.split("+")[0]
    if scheme in ("", "file"):
        raise UserError(
            f"tracking.uri: got {uri!r}; expected sqlite:///FILE, http://HOST:PORT or a database, because MLflow no longer keeps "
            f"records in plain folders; fix: --set tracking.uri=sqlite:///{uri.removeprefix('file:').strip('./') or 'mlflow'}.db"
        )
    try:
        if scheme == "sqlite":
            _make_parent(uri)
        elif scheme in ("http", "https"):
            _ask_health(uri, timeout_s)
        elif scheme in DATABASE_PORTS:
            socket.create_connection((address.hostname or "localhost", address.port or DATABASE_PORTS[scheme]), timeout_s).close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"tracking.uri: got {without_password(uri)!r}; expected an MLflow that answers: {error}; fix: {HOW_TO_START}"
        ) from error


def connect(uri: str) -> "MlflowClient":
    """Return a client of a tracking and registry URI, with the tables of a new database made (seconds, once for each).

    Raises:
        UserError: if the URI does not answer, or its database belongs to another version of MLflow.
    """
    check_reachable(uri)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with _quiet_table_creation():
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError) as error:
        raise UserError(f"tracking.uri: got {without_password(uri)!r}; expected an MLflow store: {first_line(error)}") from error
    return client


def without_password(uri: str) -> str:
    """Return a URI that is safe to print.

    Raises:
        UserError: if it cannot be taken apart.
    """
    password = _parts(uri).password
    return uri.replace(f":{password}@", ":***@") if password else uri


def sqlite_file(uri: str) -> Path | None:
    """Return the file of a SQLite URI; None if it is of another kind, keeps its records in memory, or gives SQLite a URI of its own."""
    scheme, _, path = uri.partition("?")[0].partition(":///")
    named = bool(path) and path != ":memory:" and not path.startswith("file:")
    return Path(path) if scheme.split("+")[0] == "sqlite" and named else None


def how_to_open(uri: str) -> str:
    """Return what shows a store's runs in a browser: a server's own address, or the command that serves a database."""
    safe = without_password(uri)
    return safe if urlsplit(uri).scheme in ("http", "https") else f"mlflow ui --backend-store-uri {safe}"


@contextmanager
def mlflow_errors(doing: str) -> Iterator[None]:
    """Turn a failure of MLflow inside the block into one sentence.

    Raises:
        StageError: saying what was being done and what MLflow answered.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise StageError(f"tracking: {doing} failed: {first_line(error)}") from error


@contextmanager
def _quiet_table_creation() -> Iterator[None]:
    """Hold back MLflow's remarks on making tables; a new database is no news to somebody who started a run."""
    logger = logging.getLogger("mlflow.store.db.utils")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def _parts(uri: str) -> SplitResult:
    """Take a URI apart."""
    try:
        return urlsplit(uri)
    except ValueError as error:
        raise UserError(f"tracking.uri: got {uri!r}; expected a URI, but this one is broken: {error}") from None


def _make_parent(uri: str) -> None:
    """Make the folder of a SQLite file."""
    file = sqlite_file(uri)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)


def _ask_health(uri: str, timeout_s: float) -> None:
    """Ask a server whether it lives; one that wants a password first lives too."""
    # urllib would take name and password for a part of the host.
    address = urlsplit(uri)
    health = f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path.rstrip('/')}/health"
    try:
        with urllib.request.urlopen(health, timeout=timeout_s):  # noqa: S310  (http or https, checked)
            pass
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            raise
