"""Stage `evaluate`: the bundle on the held-out photographs, beside bicubic, under a named protocol."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from linearsr.bundle import load_bundle
from linearsr.degradation import degrade, upsample
from linearsr.metrics import Meter
from linearsr.upscaler import Estimate, Upscaler
from linearsr_platform import storage
from linearsr_platform.data.reader import read_images
from linearsr_platform.recipe.identity import stable_hash
from linearsr_platform.stages.assemble import bundle_url
from linearsr_platform.stages.context import RunContext, StageOutput
from linearsr_platform.stages.prepare import shards_of
from linearsr_platform.tracking.runs import TrackedRun

ROWS = ("bicubic", "one_step", "routed")
"""What is compared, beside the LR image and the original."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Photograph:
    """A held-out photograph and its degraded version, uint8 (H, W, 3)."""

    name: str
    original: Pixels
    lr: Pixels
    tags: list[str]


def settings(context: RunContext) -> object:
    """Return what is measured, how, and under which degradation."""
    recipe = context.recipe
    dump = recipe.model_dump(mode="json")
    return {"evaluate": dump["evaluate"], "degradation": dump["degradation"], "weights": recipe.validation.weights}


def run(context: RunContext, url: str, tracked: TrackedRun) -> StageOutput:
    """Measure bicubic, the one-step estimate, the routed sampler and a sweep over its steps; keep every picture."""
    section = context.recipe.evaluate
    photographs = held_out(context)
    with storage.local_path(bundle_url(context)) as folder:
        upscaler = Upscaler(load_bundle(folder))
    meter = Meter(section.metrics, section.protocol, context.metric_weights)
    sweep_steps = [steps for steps in section.step_sweep if steps != context.recipe.sampler.num_steps]
    total, done = len(photographs) * (len(ROWS) + len(sweep_steps)), 0
    table: dict[str, dict[str, dict[str, float]]] = {}
    for photograph in photographs:
        for row, restore in restorers(upscaler, photograph, section.seed, sweep_steps).items():
            picture = restore()
            table.setdefault(row, {})[photograph.name] = measure(meter, picture, photograph.original)
            if row in ROWS:
                _save(storage.join(url, "pictures", f"{photograph.name}-{row}.png"), picture)
            done += 1
            context.display.update("evaluate", done, total)
        for row, picture in (("lr", photograph.lr), ("original", photograph.original)):
            _save(storage.join(url, "pictures", f"{photograph.name}-{row}.png"), picture)
    rows = {row: _mean(table[row].values()) for row in ROWS}
    sweep = {steps: _mean(table[f"steps-{steps}"].values()) for steps in sweep_steps}
    sweep[context.recipe.sampler.num_steps] = rows["routed"]
    for row, values in rows.items():
        tracked.log_metrics(0, {f"{row}/{name}": value for name, value in values.items()})
    data = {
        "protocol": protocol(context, meter),
        "test_set": stable_hash([stable_hash(photograph.original.tolist()) for photograph in photographs]),
        "rows": rows,
        "photographs": {row: table[row] for row in ROWS},
        "sweep": {str(steps): sweep[steps] for steps in sorted(sweep)},
        "names": [photograph.name for photograph in photographs],
    }
    tracked.log_dict(data, "evaluation.json")
    return StageOutput(_headline(rows, section.perceptual), data)


def protocol(context: RunContext, meter: Meter) -> dict[str, object]:
    """Return everything that must be equal for two evaluations to be comparable."""
    recipe = context.recipe
    return {"metrics": meter.protocol, "scale": recipe.model.scale, "degradation": asdict(recipe.degradation), "seed": recipe.evaluate.seed}


def held_out(context: RunContext) -> list[Photograph]:
    """Degrade the held-out photographs, cropped to a multiple of the scale, each with a seed of its own."""
    recipe = context.recipe
    scale, photographs = recipe.model.scale, []
    for index, (_, image, meta) in enumerate(read_images(shards_of(context, "held-out"))):
        height, width = (side // scale * scale for side in image.shape[:2])
        original = np.ascontiguousarray(image[:height, :width])
        lr = degrade(original, scale, recipe.degradation, np.random.default_rng([recipe.evaluate.seed, index]))
        name = str(meta["file"]).rsplit("/", 1)[-1].rsplit(".", 1)[0]
        tags = meta["tags"]
        photographs.append(Photograph(name, original, lr, [str(tag) for tag in tags] if isinstance(tags, list) else []))
    return photographs


def restorers(upscaler: Upscaler, photograph: Photograph, seed: int, sweep_steps: list[int]) -> dict[str, Callable[[], Pixels]]:
    """Return how each row's picture is made, by row name."""
    picture, tags = Image.fromarray(photograph.lr), photograph.tags

    def upscale(steps: int | None, estimate: Estimate) -> Callable[[], Pixels]:
        return lambda: np.asarray(upscaler.upscale(picture, tags=tags, seed=seed, steps=steps, estimate=estimate))

    return {
        "bicubic": lambda: upsample(photograph.lr, upscaler.bundle.config.scale),
        "one_step": upscale(None, "one_step"),
        "routed": upscale(None, "routed"),
        **{f"steps-{steps}": upscale(steps, "routed") for steps in sweep_steps},
    }


def measure(meter: Meter, picture: Pixels, original: Pixels) -> dict[str, float]:
    """Measure one picture against its original."""
    restored, truth = (torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255 for image in (picture, original))
    return {name: float(values[0]) for name, values in meter.measure(restored, truth).items()}


def _save(url: str, picture: Pixels) -> None:
    with storage.atomic_file(url) as path:
        Image.fromarray(picture).save(path)


def _mean(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    values = list(rows)
    return {name: float(np.mean([row[name] for row in values])) for name in values[0]}


def _headline(rows: Mapping[str, Mapping[str, float]], perceptual: str) -> str:
    shown = ("psnr_y", "ssim_y", perceptual)
    parts = [f"{row} " + " ".join(f"{name} {rows[row][name]:.4g}" for name in shown if name in rows[row]) for row in ROWS]
    return " | ".join(parts)
