"""The metric histories of a run, read back from MLflow."""

import re
from math import nan
from typing import TYPE_CHECKING

from linearsr_platform.errors import UserError
from linearsr_platform.tracking.failures import first_line
from linearsr_platform.tracking.runs import PARENT_TAG
from linearsr_platform.tracking.store import mlflow_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

LARGEST_STORED = 1e308
"""Databases hold infinity as the largest float, 1.797e308."""
_NOT_FINITE = "nonfinite."


def metric_names(client: "MlflowClient", run_id: str) -> list[str]:
    """List the metrics of a run in alphabetical order, also those of which every value was NaN or infinite.

    Raises:
        UserError: if there is no such run.
    """
    from mlflow.exceptions import MlflowException

    try:
        data = client.get_run(run_id).data
    except MlflowException as error:
        raise UserError(f"--run: got {run_id!r}; expected the id of a run in this MLflow store; fix: {first_line(error)}") from error
    return sorted({*data.metrics, *(tag.removeprefix(_NOT_FINITE) for tag in data.tags if tag.startswith(_NOT_FINITE))})


def child_runs(client: "MlflowClient", run_id: str) -> dict[str, str]:
    """Return name by id of the runs nested directly in a run."""
    with mlflow_errors(f"listing runs nested in {run_id}"):
        experiment = client.get_run(run_id).info.experiment_id
        found = client.search_runs([experiment], f"tags.`{PARENT_TAG}` = '{run_id}'")
    return {run.info.run_id: str(run.info.run_name) for run in found}


def metric_histories(client: "MlflowClient", run_id: str, names: list[str]) -> list[tuple[int, dict[str, float]]]:
    """Return (step, values) in ascending order of steps, a metric left out where it was not logged.

    Of several values at one step the latest counts: a run that was resumed writes some steps again. NaN stands for what is not
    finite, also where `TrackedRun.log_metrics` kept only a tag of the first.
    """
    points: dict[int, dict[str, float]] = {}
    with mlflow_errors(f"reading metrics of run {run_id}"):
        tags = client.get_run(run_id).data.tags
        for name in names:
            marked = re.search(r"at step (\d+)$", tags.get(f"{_NOT_FINITE}{name}", ""))
            if marked:
                points.setdefault(int(marked.group(1)), {})[name] = nan
            for metric in sorted(client.get_metric_history(run_id, name), key=lambda metric: metric.timestamp):
                value = float(metric.value)
                points.setdefault(metric.step, {})[name] = value if abs(value) < LARGEST_STORED else nan
    return sorted(points.items())
