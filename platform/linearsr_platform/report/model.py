"""What a run report shows, as frozen dataclasses that turn into JSON. Reads no file and knows no stage."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Literal

from linearsr.metric_table import METRICS
from linearsr_platform.json_numbers import null_for_nan

EstimateKind = Literal["bicubic", "one_step", "routed"]
CURVE_AXES = ("step", "seconds")
"""Keys of a history point that are not metrics."""


def orientation(metric: str) -> bool | None:
    """Return whether higher is better; None for a metric this page knows nothing about."""
    if metric == "loss":
        return False
    return METRICS[metric].higher_is_better if metric in METRICS else None


def measured(values: Mapping[str, float], metric: str) -> float | None:
    """Return a value, or None if it is missing or not finite."""
    value = values.get(metric)
    return value if value is not None and isfinite(value) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRecord:
    """How one stage of the run went."""

    name: str
    status: Literal["done", "skipped", "failed"]
    seconds: float
    summary: str = ""
    """One sentence: what it made, or why it failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerCurve:
    """Validation curves of one trainer and what the knee detector made of them."""

    stage: str
    """Stage it belongs to: `pretrain`, `experts`, `finetune`."""
    name: str
    """`expert-N` takes the colour of that expert everywhere."""
    history: tuple[dict[str, float], ...]
    """Points `{"step", "seconds", metric...}`; a metric may be missing or not finite at some of them."""
    knee_step: int | None
    confirmed_at: int | None
    reason: str
    stopped_by: str
    """`knee`, `max_steps` or `max_seconds`."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics in the history, in the order they first appear."""
        return tuple(dict.fromkeys(key for point in self.history for key in point if key not in CURVE_AXES))

    def points(self, metric: str) -> list[tuple[float, float]]:
        """Return the finite (step, value) pairs of one metric."""
        return [(point["step"], value) for point in self.history if (value := measured(point, metric)) is not None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TripRow:
    """A trip of the guard that training recovered from."""

    stage: str
    trainer: str
    step: int
    """First bad step."""
    seen: str
    """Statistic, what it was and what it should have been."""
    evidence: str
    """Where it was first seen, layer and worker, as far as that came out."""
    action: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricColumn:
    """A metric of the evaluation: a number carries its protocol."""

    name: str
    protocol: str
    """Identifier of colour space, crop, weights and degradation behind the number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRow:
    """One way to make the pictures, and what it scored."""

    kind: EstimateKind
    label: str
    """Shown in tables; equal to the label of its pictures in `PhotoStrip.images`, so that they carry its scores."""
    values: dict[str, float]
    """Metric -> mean over photographs."""
    per_photograph: dict[str, dict[str, float]]
    """Photograph -> metric -> value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProtocolScores:
    """What the same pictures scored under one protocol."""

    name: str
    about: str
    """How it measures, in a line."""
    images: int
    """Number of images behind every mean."""
    weights: dict[str, str]
    """Metric -> hash of its weights; `none` for one without."""
    values: dict[str, dict[str, float]]
    """Label of an evaluation row -> metric -> mean."""
    intervals: dict[str, dict[str, tuple[float, float]]]
    """The same -> 95 % interval of the mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPoint:
    """Mean scores of the routed sampler at one number of steps."""

    steps: int
    values: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class GateRow:
    """One rule of the gate with both numbers."""

    rule: str
    asks: str
    """What must hold, in words."""
    challenger: float | str | None
    champion: float | str | None
    """None when there was no champion before, or it was not measured."""
    difference: float | None = None
    """Challenger minus champion."""
    interval: tuple[float, float] | None = None
    """Of the difference."""
    images: int = 0
    passed: bool
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromotionRecord:
    """What the gate decided, with the numbers that decided it."""

    promoted: bool
    state: str
    """In a word or two, as in `promoted`."""
    version: int
    champion_version: int | None
    """The champion before; None if there was none."""
    reason: str
    """Shown where there are no rules to show."""
    rules: tuple[GateRow, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingRecord:
    """Where MLflow keeps this run and its model."""

    uri: str
    experiment: str
    run_ids: dict[str, str]
    """Stage -> MLflow run; the pipeline's own run under `pipeline`."""
    model_uri: str | None = None
    model_version: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LineageRow:
    """One thing the released model was made from."""

    what: str
    identity: str
    """Hash, or another name that never changes its meaning."""
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuarantinedImage:
    """An image that `prepare` refused, and why."""

    file: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportData:
    """Everything in a report but the pictures. Empty parts leave their section out of the page."""

    recipe_name: str
    recipe_hash: str
    code_version: str
    started: str
    """ISO 8601 time with offset."""
    finished: str
    """ISO 8601 time with offset."""
    perceptual: str
    """Metric the recipe claims to beat bicubic on, named beforehand."""
    distortion: str = "psnr_y"
    """Metric the trade-off is plotted against."""
    stages: tuple[StageRecord, ...] = ()
    trainers: tuple[TrainerCurve, ...] = ()
    trips: tuple[TripRow, ...] = ()
    boundaries: tuple[float, ...] = ()
    """Ascending noise levels between experts."""
    overlap_log_snr: float = 0.0
    sampling_times: tuple[float, ...] = ()
    """Noise levels at which the routed sampler evaluates the network, descending."""
    metrics: tuple[MetricColumn, ...] = ()
    evaluation: tuple[EvaluationRow, ...] = ()
    """Under the first protocol."""
    protocols: tuple[ProtocolScores, ...] = ()
    """Every protocol, the first too."""
    test_set: str = ""
    """Hash of the images' names and pixels."""
    tags_read: str = ""
    """Whose tags the model was told, in words; empty where it was not recorded."""
    sweep: tuple[SweepPoint, ...] = ()
    splits: dict[str, int] | None = None
    """Split -> number of images in its shards."""
    quarantined: tuple[QuarantinedImage, ...] = ()
    tracking: TrackingRecord | None = None
    promotion: PromotionRecord | None = None
    lineage: tuple[LineageRow, ...] = ()

    @property
    def photographs(self) -> tuple[str, ...]:
        """Names of the evaluated photographs."""
        return tuple(dict.fromkeys(name for row in self.evaluation for name in row.per_photograph))

    def row(self, kind: EstimateKind) -> EvaluationRow | None:
        """Return the first evaluation row of a kind, or None if there is none."""
        return next((row for row in self.evaluation if row.kind == kind), None)

    def values(self, kind: EstimateKind) -> dict[str, float]:
        """Return the mean scores of the first row of a kind; empty if there is none."""
        row = self.row(kind)
        return row.values if row else {}

    def to_json(self) -> str:
        """Return the data as strict JSON; numbers that are not finite become null."""
        return json.dumps(null_for_nan(asdict(self)), indent=1, allow_nan=False)
