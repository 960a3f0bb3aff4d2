"""Stage `evaluate`: the bundle on the held-out photographs, beside bicubic, under each named protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite

import numpy as np

from linearsr.conditioning import TextEmbedding
from linearsr.metrics import smallest_side
from linearsr.protocols import PROTOCOLS
from linearsr_platform import storage
from linearsr_platform.cluster.capacity import Share
from linearsr_platform.cluster.crew import RayCrew
from linearsr_platform.cluster.experts import room_now
from linearsr_platform.data.crew import Crew, SerialCrew
from linearsr_platform.data.degraded import lr_image
from linearsr_platform.data.manifest import Manifest
from linearsr_platform.data.reader import read_images
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.schema import Recipe
from linearsr_platform.registry.evaluation import ProtocolTable
from linearsr_platform.stages.assemble import bundle_url
from linearsr_platform.stages.context import RecipeContext, RunContext, StageOutput
from linearsr_platform.stages.measured_set import (
    MakeMeasurer,
    MakeTagReading,
    check_names,
    check_request,
    measure_all,
    read_tags,
    tables_of,
    tags_read,
    tags_told,
)
from linearsr_platform.stages.measuring import ROWS, Measured, Photograph, Piece, Request, save_png
from linearsr_platform.stages.model_work import measuring_share, measuring_work, reading_work
from linearsr_platform.stages.prepare import manifest_of, shards_of
from linearsr_platform.tracking.runs import TrackedRun

TEST_SET = "test_set"
"""Folder of the photographs that were measured: `lr/`, with `TEST_SET_FILE` in it, and `original/`, which `linearsr evaluate` takes."""
TEST_SET_FILE = "test_set.json"
"""How a folder of LR pictures was made, and the tags of each: `degradation`, `seed`, `tags`; `lr_tags` names those whose tags are of the
LR image itself, if there are such."""


def settings(context: RunContext) -> object:
    """Return what is measured, how, and under which degradation."""
    recipe = context.recipe
    dump = recipe.model_dump(mode="json")
    return {"evaluate": dump["evaluate"], "degradation": dump["degradation"], "weights": recipe.validation.weights}


def run(context: RunContext, url: str, tracked: TrackedRun) -> StageOutput:
    """Measure bicubic, the one-step estimate, the routed sampler and a sweep over its steps; keep every picture.

    Photographs that an interrupted run finished in this folder, which is named by all settings, are not done again.
    """
    photographs, request = held_out(context), _request(context)
    _publish(context, url, photographs)
    largest = _largest(photographs)
    work = measuring_work(context.recipe, largest)
    make = MakeMeasurer(
        request=request,
        bundle_url=bundle_url(context),
        largest_lr_px=largest,
        part_of_device=min(1.0, work.gpus(context.recipe) or 1.0),
        device=work.device(context.recipe),
        compiled_kernels=context.recipe.cluster.compiled_kernels,
        pictures_url=storage.join(url, "pictures"),
        results_url=storage.join(url, "measured"),
    )
    measured = measure_all(
        photographs,
        make,
        lambda count: _crew(context, count, largest),
        lambda done, total: context.display.update("evaluate", done, total),
        lambda left: _read_tags(context, left),
    )
    degradation = asdict(context.recipe.degradation)
    how = comparable(scale=context.recipe.model.scale, degradation=degradation, seed=request.seed, measured=measured)
    tables = tables_of([photograph.name for photograph in photographs], measured, request, ROWS, how)
    for name, table in tables.items():
        prefix = "" if name == context.recipe.evaluate.protocols[0] else f"{name}/"
        for row, values in table.rows.items():
            tracked.log_metrics(0, {f"{prefix}{row}/{metric}": value for metric, value in values.items()})
    data = {
        "tables": {name: table.to_plain(with_values=True, strict=True) for name, table in tables.items()},
        "sweep": _sweep(context, measured, tables),
        "names": [photograph.name for photograph in photographs],
        "tags": tags_told(photographs, measured),
    }
    tracked.log_dict(data, "evaluation.json")
    return StageOutput(_headline(next(iter(tables.values())).rows, context.recipe.evaluate.perceptual), data)


def check_held_out(context: RunContext, manifest: Manifest) -> None:
    """Refuse, before anything is trained, what could not be measured of the photographs that were held out.

    Raises:
        UserError: if there are too few of them for a metric, or the smallest is too small for one.
    """
    held_out, sizes = manifest.splits.get("held-out"), (manifest.sizes or {}).get("held-out")
    if held_out is None or sizes is None:
        return
    request, scale = _request(context), context.recipe.model.scale
    check_request(request, held_out.samples)
    # Of the smallest area: a long, narrow one may be too small all the same, which measuring will say.
    side = min(sizes.smallest) // scale * scale
    for protocol, metrics in request.metrics.items():
        for metric in metrics:
            if side < (least := smallest_side(metric, PROTOCOLS[protocol].border_px)):
                raise UserError(
                    f"data.held_out: got a photograph of {sizes.smallest[0]} x {sizes.smallest[1]} px; expected sides of at least "
                    f"{least} px for {metric!r} under {protocol!r}; fix: leave one of them out"
                )


def comparable(*, scale: int | None, degradation: object, seed: int, measured: Sequence[Measured]) -> dict[str, object]:
    """Return what besides protocol and weights of metrics must be equal for two evaluations to be comparable.

    Tags of LR images are part of it where some were read, so that evaluations without any stay comparable with earlier ones.
    """
    found: dict[str, object] = {"scale": scale, "degradation": degradation, "seed": seed}
    return found | ({"tags": tags_read(measured)} if any(one.lr_tags is not None for one in measured) else {})


def held_out(context: RunContext) -> list[Photograph]:
    """Degrade the held-out photographs, cropped to a multiple of the scale, each with a seed of its own.

    Their tags are those of the LR image where there are some, which `tag --lr` makes as it is made here: the original's say what nobody
    sees who restores. Source: method.md 2.9.

    Raises:
        UserError: if two of them have the same name.
    """
    recipe = context.recipe
    photographs = []
    for _, image, meta in read_images(shards_of(context, "held-out")):
        name = str(meta["file"]).rsplit("/", 1)[-1].rsplit(".", 1)[0]
        original, lr = lr_image(image, scale=recipe.model.scale, degradation=recipe.degradation, seed=recipe.evaluate.seed, name=name)
        of_lr = "tags_lr" in meta
        tags = meta["tags_lr" if of_lr else "tags"]
        words = tuple(str(tag) for tag in tags) if isinstance(tags, list) else ()
        photographs.append(Photograph(name=name, original=original, lr=lr, tags=words, tags_of_lr=of_lr))
    check_names([photograph.name for photograph in photographs])
    return photographs


def _crew(context: RecipeContext, count: int, largest: tuple[int, int]) -> Crew:
    """Return who measures that many photographs: workers of the cluster, where they are worth one.

    As many work at once as there is room for, with a picture of the `largest` (height, width) of LR in each.
    """
    if not measuring_work(context.recipe, largest).wants_cluster(context.recipe, count):
        return SerialCrew()
    context.open_cluster()
    return _workers(context.recipe, measuring_share(context.recipe, largest, room_now()))


def _workers(recipe: Recipe, share: Share) -> RayCrew:
    return RayCrew(share, patience_s=recipe.cluster.queue_timeout_s)


def _read_tags(context: RecipeContext, photographs: Sequence[Piece]) -> dict[str, TextEmbedding]:
    """Return what a text encoder makes of photographs' tags, by prompt; nothing where the network learns its own embedding."""
    recipe, text = context.recipe, manifest_of(context).text
    if text is None:
        return {}
    work = reading_work(text.encoder)

    def choose(count: int) -> Crew:
        if not work.wants_cluster(recipe, count):
            return SerialCrew()
        context.open_cluster()
        return _workers(recipe, work.share(recipe, room_now()))

    return read_tags(photographs, MakeTagReading(text=text, device=work.device(recipe)), choose)


def _largest(photographs: Sequence[Photograph]) -> tuple[int, int]:
    """Return the (height, width) of the LR picture with the most pixels."""
    sizes = [photograph.lr.shape for photograph in photographs if photograph.lr is not None]
    height, width, _ = max(sizes, key=lambda shape: shape[0] * shape[1])
    return height, width


def _request(context: RunContext) -> Request:
    recipe = context.recipe
    section = recipe.evaluate
    return Request(
        metrics={name: section.measured(name) for name in section.protocols},
        weights=context.metric_weights,
        seed=section.seed,
        sweep_steps=tuple(steps for steps in section.step_sweep if steps != recipe.sampler.num_steps),
    )


def _publish(context: RunContext, url: str, photographs: Sequence[Photograph]) -> None:
    """Write the test set, so that any other model can be measured on the very same pixels."""
    recipe = context.recipe
    for photograph in photographs:
        for kind, pixels in (("lr", photograph.lr), ("original", photograph.original)):
            assert pixels is not None  # noqa: S101 (`held_out` makes both)
            with storage.atomic_file(storage.join(url, TEST_SET, kind, f"{photograph.name}.png")) as path:
                save_png(pixels, path)
    tags = {photograph.name: list(photograph.tags) for photograph in photographs}
    facts = {"degradation": asdict(recipe.degradation), "seed": recipe.evaluate.seed, "tags": tags}
    of_lr = [photograph.name for photograph in photographs if photograph.tags_of_lr]
    facts |= {"lr_tags": of_lr} if of_lr else {}
    storage.write_json(storage.join(url, TEST_SET, "lr", TEST_SET_FILE), facts)


def _sweep(context: RunContext, measured: Sequence[Measured], tables: Mapping[str, ProtocolTable]) -> dict[str, Mapping[str, float]]:
    """Return the means of each number of steps under the first protocol, in order; those that are not finite are left out."""
    recipe = context.recipe
    first = recipe.evaluate.protocols[0]
    means: dict[int, Mapping[str, float]] = {recipe.sampler.num_steps: tables[first].rows["routed"]}
    for steps in recipe.evaluate.step_sweep:
        rows = [one.values[first][f"steps-{steps}"] for one in measured if steps != recipe.sampler.num_steps]
        if rows:
            means[steps] = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return {str(steps): {name: value for name, value in means[steps].items() if isfinite(value)} for steps in sorted(means)}


def _headline(rows: Mapping[str, Mapping[str, float]], perceptual: str) -> str:
    shown = ("psnr_y", "ssim_y", perceptual)
    parts = [f"{row} " + " ".join(f"{name} {rows[row][name]:.4g}" for name in shown if name in rows[row]) for row in ROWS]
    return " | ".join(parts)
