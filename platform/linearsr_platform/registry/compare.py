"""What two versions differ in: numbers image by image, experts, boundaries, data."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from linearsr_platform.recipe.promote_schema import PromoteSection
from linearsr_platform.registry.evaluation import ProtocolTable
from linearsr_platform.registry.gate import SHOWN_CONFIDENCE, difference_of, lower_is_better, why_not_comparable
from linearsr_platform.registry.models import EVALUATION_TAG, EXPERTS_TAG, RULES_TAG, ModelVersion, read_evaluation
from linearsr_platform.registry.paired import PairedDifference

if TYPE_CHECKING:
    from mlflow import MlflowClient

_NOT_LINEAGE = (EVALUATION_TAG, EXPERTS_TAG, RULES_TAG, "evaluation_file", "bundle_digest", "lineage.stages", "lineage.knee_steps")


@dataclass(frozen=True, kw_only=True)
class MetricDifference:
    """One metric of one row under one protocol."""

    protocol: str
    row: str
    metric: str
    first: float | None
    second: float | None
    paired: PairedDifference | None
    """Second minus first; None where it cannot be said."""
    better: bool | None
    """Whether the second is better, as far as the interval tells; None if it holds 0 or the metric's direction is unknown."""
    note: str = ""
    """Why there is no paired difference."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two versions differ in."""

    metrics: tuple[MetricDifference, ...]
    experts: Mapping[str, tuple[str | None, str | None]]
    """Expert to the hash of its weights in both; those that are the same too."""
    lineage: Mapping[str, tuple[str | None, str | None]]
    """Boundaries, data and all else that differs, as text."""


def compare(client: "MlflowClient", first: ModelVersion, second: ModelVersion) -> Comparison:
    """Compare two versions.

    Raises:
        UserError: if an evaluation is not the one that was registered.
        StageError: if MLflow refuses.
    """
    tables = [{} if found is None else found.tables for found in (read_evaluation(client, version) for version in (first, second))]
    metrics = [
        difference
        for name in sorted({*tables[0], *tables[1]})
        for difference in _differences(name, tables[0].get(name), tables[1].get(name))
    ]
    keys = sorted({*first.tags, *second.tags} - set(_NOT_LINEAGE))
    lineage = {key.removeprefix("lineage."): (first.tags.get(key), second.tags.get(key)) for key in keys}
    hashes = [{expert["name"]: str(expert["sha256"]) for expert in experts_of(version)} for version in (first, second)]
    return Comparison(
        metrics=tuple(metrics),
        experts={name: (hashes[0].get(name), hashes[1].get(name)) for name in sorted({*hashes[0], *hashes[1]})},
        lineage={key: both for key, both in lineage.items() if both[0] != both[1]},
    )


def experts_of(version: ModelVersion) -> list[dict[str, Any]]:
    """Return what each expert of a version came from: `name`, `sha256` and, as far as it is known, `knees`, `weights`, `from`."""
    found: list[dict[str, Any]] = json.loads(version.tags.get(EXPERTS_TAG, "[]"))
    return found


def _differences(protocol: str, first: ProtocolTable | None, second: ProtocolTable | None) -> list[MetricDifference]:
    rows = [{} if table is None else table.rows for table in (first, second)]
    return [
        _difference(protocol, row, metric, first, second)
        for row in sorted({*rows[0], *rows[1]})
        for metric in sorted({*rows[0].get(row, {}), *rows[1].get(row, {})})
    ]


def _difference(protocol: str, row: str, metric: str, first: ProtocolTable | None, second: ProtocolTable | None) -> MetricDifference:
    means = [None if table is None else table.rows.get(row, {}).get(metric) for table in (first, second)]
    paired: PairedDifference | str = "measured in one of them only"
    if first is not None and second is not None and None not in means:
        paired = why_not_comparable(second, first) or difference_of(
            second, first, row, metric, confidence=SHOWN_CONFIDENCE, section=PromoteSection()
        )
    lower = lower_is_better(metric)
    better = None
    if isinstance(paired, PairedDifference) and lower is not None and (paired.low > 0 or paired.high < 0):
        better = (paired.mean < 0) is lower
    return MetricDifference(
        protocol=protocol,
        row=row,
        metric=metric,
        first=means[0],
        second=means[1],
        paired=paired if isinstance(paired, PairedDifference) else None,
        better=better,
        note=paired if isinstance(paired, str) else f"weak: {paired.images} images" if paired.weak else "",
    )
