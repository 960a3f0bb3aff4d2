"""Which weights of a finished trainer its MLflow run keeps."""

from typing import Literal

from linearsr.metric_table import metric_spec
from linearsr_platform import storage
from linearsr_platform.train.outcome import TrainOutcome

Policy = Literal["best", "knee", "all", "none"]


def kept_weights(outcome: TrainOutcome, policy: Policy) -> list[str]:
    """Return the URLs of the weights to keep.

    Args:
        outcome: what the trainer came to.
        policy: `knee` are those handed on, `all` the snapshots that are left, `best` the one of these with the best validation by the
            first metric that watched for the knee; without such a metric those handed on.
    """
    if policy == "none":
        return []
    if policy == "knee":
        return [outcome.knee_weights]
    left = storage.list_files(storage.parent(outcome.knee_weights), "step_*.safetensors")
    return left if policy == "all" else [_best(outcome, left)]


def _best(outcome: TrainOutcome, left: list[str]) -> str:
    metric = next(iter(outcome.decision["metrics"]), None)
    if metric is None:
        return outcome.knee_weights
    sign = 1 if metric_spec(metric).higher_is_better else -1
    by_step = {f"step_{int(point['step']):08d}.safetensors": sign * point[metric] for point in outcome.history if metric in point}
    return max(
        (file for file in left if storage.name_of(file) in by_step),
        key=lambda file: by_step[storage.name_of(file)],
        default=outcome.knee_weights,
    )
