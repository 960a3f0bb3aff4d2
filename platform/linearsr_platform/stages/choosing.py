"""Which metrics of a protocol can be measured on the pictures and the weights that are there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from linearsr.frechet import LEAST_IMAGES
from linearsr.metric_table import metric_spec
from linearsr.metrics import MetricError, MissingWeightsError, find_weights, import_pyiqa
from linearsr.protocols import PROTOCOLS
from linearsr_platform.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is measured under each protocol, and what of the protocols' own lists is not."""

    metrics: Mapping[str, tuple[str, ...]]
    """Protocol to metrics, besides the artefacts."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Metric to the reason."""


def choose(protocols: Sequence[str], asked: Sequence[str], *, weights: str | None, count: int, originals: bool) -> Choice:
    """Return what to measure: what was asked for, or each protocol's own list as far as it can be measured.

    Args:
        protocols: names, each once.
        asked: metrics that must be measured; none takes the protocols' own.
        weights: folder with the weights of learned metrics.
        count: number of pictures.
        originals: whether there are originals to compare with.

    Raises:
        UserError: if a metric that was asked for cannot be measured, or none of a protocol's own can.
    """
    if asked:
        metrics = {name: PROTOCOLS[name].resolve(asked) for name in protocols}
        for metric in dict.fromkeys(metric for names in metrics.values() for metric in names):
            if reason := _why_not(metric, weights, count, originals=originals):
                files = ", ".join(metric_spec(metric).weights_files)
                raise UserError(f"--metric: got {metric!r}{f', which needs {files}' if files else ''}; {reason}")
        return Choice(metrics=metrics)
    left_out: dict[str, str] = {}
    metrics = {}
    for name in protocols:
        reasons = {metric: _why_not(metric, weights, count, originals=originals) for metric in PROTOCOLS[name].metrics}
        left_out |= {metric: reason for metric, reason in reasons.items() if reason}
        metrics[name] = tuple(metric for metric, reason in reasons.items() if not reason)
    if not any(metrics.values()):
        why = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason(left_out).items())
        raise UserError(f"evaluate: got nothing that can be measured under {', '.join(protocols)} ({why})")
    return Choice(metrics=metrics, left_out=left_out)


def by_reason(left_out: Mapping[str, str]) -> dict[str, list[str]]:
    """Return reason to the metrics that were left out for it."""
    found: dict[str, list[str]] = {}
    for metric, reason in left_out.items():
        found.setdefault(reason, []).append(metric)
    return found


def _why_not(metric: str, weights: str | None, count: int, *, originals: bool) -> str:
    """Say what a metric lacks; empty if nothing."""
    spec = metric_spec(metric)
    if spec.full_reference and not originals:
        return "no originals to compare with; fix: --original DIR"
    if spec.scope == "set" and count < LEAST_IMAGES:
        return f"{count} images; expected at least {LEAST_IMAGES}, or its covariance is singular; fix: a larger test set"
    if spec.scope == "artefact":
        return "it is always measured where LR pictures or tiles are known; fix: leave it out"
    try:
        find_weights(metric, None if weights is None else Path(weights))
        if spec.needs != "none":
            import_pyiqa([metric])
    except MissingWeightsError:
        return "no folder of weights; fix: --weights DIR" if weights is None else f"its weights are not in {weights}; fix: put them there"
    except MetricError as error:
        return str(error)
    return ""
