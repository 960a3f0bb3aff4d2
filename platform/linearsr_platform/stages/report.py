"""The report of a run: gathers what the stages left behind. Not a stage itself, for it is made anew every time."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from typing import Any

from PIL import Image

from linearsr.guard import Trip
from linearsr.sampling import sampling_times
from linearsr_platform import storage
from linearsr_platform.registry.evaluation import Evaluation, ProtocolTable
from linearsr_platform.report.html import render_report, write_report
from linearsr_platform.report.model import (
    EstimateKind,
    EvaluationRow,
    GateRow,
    LineageRow,
    MetricColumn,
    PromotionRecord,
    ProtocolScores,
    QuarantinedImage,
    ReportData,
    StageRecord,
    SweepPoint,
    TrackingRecord,
    TrainerCurve,
    TripRow,
)
from linearsr_platform.report.strips import PhotoStrip, comparison_strip
from linearsr_platform.stages import evaluate
from linearsr_platform.stages.context import RunContext
from linearsr_platform.stages.experts import boundaries_of
from linearsr_platform.stages.prepare import manifest_of
from linearsr_platform.tracking.store import without_password

EMBEDDED = 12
"""Photographs whose pictures are in the report itself: five versions of each are held in memory, and opened by a browser."""
TRAINED = ("pretrain", "experts", "finetune")
LABELS: dict[EstimateKind, str] = {"bicubic": "Bicubic", "one_step": "One step", "routed": "Routed"}


def write(context: RunContext, records: Sequence[StageRecord], started: datetime) -> str:
    """Write `report.html` and one comparison strip a photograph into the run's folder; return the report's URL."""
    strips: list[PhotoStrip] = []
    for strip in photo_strips(context):
        if len(strips) < EMBEDDED:
            strips.append(strip)
        with storage.atomic_file(storage.join(context.run_url, "pictures", f"{strip.name}.png")) as path:
            comparison_strip(strip.images).save(path)
            context.pipeline_run.log_artifact(path, "pictures")
    url = storage.join(context.run_url, "report.html")
    html = render_report(gather(context, records, started), strips)
    write_report(html, url)
    context.pipeline_run.log_text(html, "report.html")
    return url


def gather(context: RunContext, records: Sequence[StageRecord], started: datetime) -> ReportData:
    """Collect everything in the report but the pictures; what was not reached stays empty."""
    recipe, results = context.recipe, context.results
    data: dict[str, Any] = {}
    if "prepare" in results:
        manifest = manifest_of(context)
        data["splits"] = {name: split.samples for name, split in manifest.splits.items()}
        data["quarantined"] = tuple(QuarantinedImage(file=one.file, reason=one.reason) for one in manifest.quarantined)
    if "evaluate" in results:
        data |= _evaluation(context)
    return ReportData(
        recipe_name=recipe.name,
        recipe_hash=context.loaded.hash,
        code_version=version("linearsr"),
        started=started.isoformat(timespec="seconds"),
        finished=datetime.now().astimezone().isoformat(timespec="seconds"),
        perceptual=recipe.evaluate.perceptual,
        stages=tuple(records),
        trainers=tuple(_curves(context)),
        trips=tuple(_trips(context)),
        boundaries=boundaries_of(context),
        overlap_log_snr=recipe.experts.overlap_log_snr,
        sampling_times=sampling_times(recipe.sampler, recipe.model.flow.shift),
        tracking=_tracking(context),
        promotion=_promotion(context),
        lineage=tuple(_lineage(context)),
        **data,
    )


def photo_strips(context: RunContext) -> Iterator[PhotoStrip]:
    """Load the pictures that `evaluate` kept, a photograph at a time: LR, bicubic, one-step, routed, original."""
    if "evaluate" not in context.results:
        return
    result = context.results["evaluate"]
    labels = _labels(context)
    for name in result.data["names"]:
        images = {"LR": _picture(result.url, evaluate.TEST_SET, "lr", f"{name}.png")}
        images |= {label: _picture(result.url, "pictures", f"{name}-{kind}.png") for kind, label in labels.items()}
        images["Original"] = _picture(result.url, evaluate.TEST_SET, "original", f"{name}.png")
        yield PhotoStrip(name=name, images=images)


def _picture(url: str, *parts: str) -> Image.Image:
    with storage.local_path(storage.join(url, *parts)) as path:
        return Image.open(path).convert("RGB")


def _labels(context: RunContext) -> dict[EstimateKind, str]:
    return {**LABELS, "routed": f"Routed, {context.recipe.sampler.num_steps} steps"}


def _evaluation(context: RunContext) -> dict[str, Any]:
    found = context.results["evaluate"].data
    tables = Evaluation.from_plain(found["tables"]).tables
    first = tables[context.recipe.evaluate.protocols[0]]
    degradation = first.protocol["degradation"]
    preset = degradation.get("preset", "quickstart") if isinstance(degradation, dict) else degradation
    tags = f"tags {found['tags']}" if "tags" in found else ""
    protocol = "; ".join(filter(None, (f"{first.protocol['metrics']}", f"degradation {preset}", tags)))
    labels = _labels(context)
    rows = [
        EvaluationRow(kind=kind, label=label, values=dict(first.rows[kind]), per_photograph=_by_image(first.values[kind]))
        for kind, label in labels.items()
    ]
    return {
        "metrics": tuple(MetricColumn(name=name, protocol=protocol) for name in dict.fromkeys(name for row in rows for name in row.values)),
        "evaluation": tuple(rows),
        "protocols": tuple(_scores(name, tables[name], labels) for name in context.recipe.evaluate.protocols),
        "test_set": first.test_set,
        "tags_read": tags,
        "sweep": tuple(SweepPoint(steps=int(steps), values=values) for steps, values in found["sweep"].items()),
    }


def _scores(name: str, table: ProtocolTable, labels: Mapping[EstimateKind, str]) -> ProtocolScores:
    weights = table.protocol["weights"]
    return ProtocolScores(
        name=name,
        about=str(table.protocol["metrics"]),
        images=table.images,
        weights=weights if isinstance(weights, dict) else {},
        values={label: dict(table.rows[kind]) for kind, label in labels.items()},
        intervals={label: dict(table.intervals.get(kind, {})) for kind, label in labels.items()},
    )


def _by_image(values: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    images: dict[str, dict[str, float]] = {}
    for metric, numbers in values.items():
        for image, value in numbers.items():
            images.setdefault(image, {})[metric] = value
    return images


def _curves(context: RunContext) -> list[TrainerCurve]:
    curves = []
    for stage in TRAINED:
        trainers = context.results[stage].data["trainers"] if stage in context.results else {}
        for name, outcome in trainers.items():
            decision = outcome["decision"]
            curves.append(
                TrainerCurve(
                    stage=stage,
                    name=name,
                    history=tuple(outcome["history"]),
                    knee_step=outcome["knee_step"],
                    confirmed_at=decision.get("confirmed_at"),
                    reason=str(decision.get("reason", "")),
                    stopped_by=outcome["stopped_by"],
                )
            )
    return curves


def _trips(context: RunContext) -> list[TripRow]:
    rows = []
    for stage in TRAINED:
        trainers = context.results[stage].data["trainers"] if stage in context.results else {}
        for name, outcome in trainers.items():
            # Results from before there was a guard have none.
            for trip in (Trip(**one) for one in outcome.get("trips", [])):
                action = f"back to step {trip.rolled_back_to}, learning rate x{trip.lr_scale:.3g}"
                seen = f"{trip.statistic} {trip.value}, expected {trip.limit}"
                rows.append(TripRow(stage=stage, trainer=name, step=trip.step, seen=seen, evidence=trip.evidence, action=action))
    return rows


def _tracking(context: RunContext) -> TrackingRecord:
    runs = {"pipeline": context.pipeline_run.run_id, **{name: result.run_id for name, result in context.results.items()}}
    registered = context.results["register"].data if "register" in context.results else None
    return TrackingRecord(
        uri=without_password(context.tracker.uri),
        experiment=context.recipe.tracking.experiment or context.recipe.name,
        run_ids=runs,
        model_uri=f"models:/{registered['name']}/{registered['version']}" if registered else None,
        model_version=str(registered["version"]) if registered else None,
    )


def _promotion(context: RunContext) -> PromotionRecord | None:
    if "promote" not in context.results:
        return None
    decision = context.results["promote"].data["decision"]
    return PromotionRecord(
        promoted=decision["promoted"],
        state=decision["state"],
        version=decision["challenger_version"],
        champion_version=decision["champion_version"],
        reason=decision["reason"],
        rules=tuple(GateRow(**{**rule, "interval": rule["interval"] and tuple(rule["interval"])}) for rule in decision["rules"]),
    )


def _lineage(context: RunContext) -> list[LineageRow]:
    results = context.results
    rows = [LineageRow(what="recipe", identity=context.loaded.hash, detail=context.recipe.name)]
    if "prepare" in results:
        rows.append(LineageRow(what="shards", identity=str(results["prepare"].data["digest"]), detail=results["prepare"].summary))
    for stage in TRAINED:
        for name, outcome in (results[stage].data["trainers"] if stage in results else {}).items():
            kept = "knee" if outcome["decision"]["confirmed_at"] is not None else "no knee yet, best"
            detail = f"{kept} at step {outcome['knee_step']}" if outcome["knee_step"] is not None else "no knee; last step"
            rows.append(LineageRow(what=f"{stage} {name}" if name != stage else stage, identity=results[stage].key, detail=detail))
    if "assemble" in results:
        rows.append(LineageRow(what="bundle", identity=str(results["assemble"].data["digest"]), detail=results["assemble"].summary))
    return rows
