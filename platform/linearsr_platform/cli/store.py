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
    from linearsr_platform.tracking.store import SQLITE_FILE, connect, default_uri

    if tracking_uri is not None:
        return connect(tracking_uri)
    uri = default_uri(storage_root)
    file = storage.join(storage_root, SQLITE_FILE)
    if not storage.exists(file):
        raise UserError(
            f"--storage: got {storage_root!r}; expected the storage root of a run, but there is no {file}; "
            "fix: name the right one, or the MLflow server with --tracking-uri"
        )
    return connect(uri)
