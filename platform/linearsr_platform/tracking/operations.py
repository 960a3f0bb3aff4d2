"""What is written to a run, as values: they can wait in a queue, lie on disk, and be sent again without doing it twice."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

MetricPoint = tuple[str, float, int, int]
"""Name, value, milliseconds since the epoch, step."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One write to a run. Sending it twice leaves what sending it once leaves.

    MLflow's SQL stores hold a metric point under all of its fields (`metric_pk` in `mlflow/store/tracking/dbmodels/models.py`) and leave
    out those that are there, a parameter may be logged again with the same value, tags and files replace what had their name.
    """

    run_id: str
    doing: str
    """What it does, for messages."""
    metrics: tuple[MetricPoint, ...] = ()
    params: tuple[tuple[str, str], ...] = ()
    tags: tuple[tuple[str, str], ...] = ()
    file: str = ""
    """Name of the file that is kept; its bytes lie beside the journal until they are sent."""
    folder: str = ""
    """Folder of the run's artifacts that takes the file."""
    status: str = ""
    """Status that closes the run."""
    end_ms: int = 0
    """When it was closed, milliseconds since the epoch."""

    def to_json(self) -> dict[str, object]:
        """Return it as JSON, without what is empty."""
        return {name: value for name, value in asdict(self).items() if value}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Operation":
        """Read it back."""
        listed = {name: tuple(tuple(row) for row in value.get(name, ())) for name in ("metrics", "params", "tags")}
        return cls(**{**value, **listed})


def send(client: "MlflowClient", operation: Operation, file: Path) -> None:
    """Do a write.

    Args:
        client: of the store that holds the run.
        operation: the write.
        file: where the bytes of its file are; not looked at if it has none.
    """
    from mlflow.entities import Metric, Param, RunTag

    if operation.metrics or operation.params or operation.tags:
        client.log_batch(
            operation.run_id,
            metrics=[Metric(*point) for point in operation.metrics],
            params=[Param(*pair) for pair in operation.params],
            tags=[RunTag(*pair) for pair in operation.tags],
        )
    if operation.file:
        client.log_artifact(operation.run_id, str(file), operation.folder or None)
    if operation.status:
        client.set_terminated(operation.run_id, operation.status, operation.end_ms)
