"""The MLflow store that commands read models from."""

from typing import TYPE_CHECKING

from linearsr_platform import storage
from linearsr_platform.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient


def existing_store(storage_root: str, tracking_uri: str | None) -> "MlflowClient":
    """Return a client of a store that is there already; asking for a model must not make an empty one.

    Raises:
        UserError: if there is none, or it does not answer.
    """
    from linearsr_platform.tracking.store import connect, default_uri, sqlite_file, without_password

    if tracking_uri is None and not storage.is_local(storage_root):
        raise UserError(
            f"--storage: got {storage_root!r}; expected with it the MLflow server that its runs log to: only a local root holds a store "
            "of its own; fix: --tracking-uri http://HOST:5000"
        )
    uri = default_uri(storage_root) if tracking_uri is None else tracking_uri
    file = sqlite_file(uri)
    if file is None or file.exists():
        return connect(uri)
    if tracking_uri is not None:
        raise UserError(f"--tracking-uri: got {without_password(uri)!r}; expected a store that is there, but there is no {file}")
    raise UserError(
        f"--storage: got {storage_root!r}; expected the storage root of a run, but there is no {file}; "
        "fix: name the right one, or the MLflow server with --tracking-uri"
    )
