"""Stage `pretrain`: measure the latents, then train one network over all noise levels until its knee."""

import hashlib

import numpy as np
import torch

from linearsr.codec_source import codec_digest
from linearsr.config import LatentStatistics
from linearsr.degradation import augment, degrade_pair
from linearsr.statistics import measure_statistics
from linearsr.task import to_pixels
from linearsr_platform import storage
from linearsr_platform.data.manifest import verify_shards
from linearsr_platform.data.reader import read_images
from linearsr_platform.stages.activations import worker_bytes
from linearsr_platform.stages.context import RecipeContext, RunContext, StageOutput
from linearsr_platform.stages.jobs import as_data, codec_of, describe, make_job, model_config, run_jobs, statistics_data
from linearsr_platform.stages.prepare import manifest_of, shards_of
from linearsr_platform.tracking.runs import TrackedRun
from linearsr_platform.train.job import TrainJob

STATISTICS_CROPS = 96
"""Training crops that latent statistics are measured on: 96 crops of 128 px hold 1.6 M pixels a channel."""

NAME = "pretrain"


def settings(context: RecipeContext) -> object:
    """Return every section that the trained network depends on, and the hashes of codec and first weights, which have no place in them."""
    recipe = context.recipe
    sections = ("degradation", "augmentation", "model", "validation")
    dump = recipe.model_dump(mode="json")
    hashes = {"codec": codec_digest(codec_of(context)), "init_weights": _content_hash(recipe.model.init_weights)}
    return {"seed": recipe.seed, **hashes, **{name: dump[name] for name in sections}, NAME: recipe.pretrain.decisive()}


def run(context: RunContext, url: str, tracked: TrackedRun) -> StageOutput:
    """Train; the result names the knee's weights and the statistics that normalise latents."""
    verify_shards(manifest_of(context), context.results["prepare"].url)
    statistics = measure(context)
    outcomes = run_jobs(context, [pretrain_job(context, url, statistics)], url, tracked)
    return StageOutput(describe(outcomes), {"trainers": as_data(outcomes), "statistics": statistics_data(statistics)})


def pretrain_job(context: RecipeContext, url: str, statistics: LatentStatistics) -> TrainJob:
    """Describe the stage's one trainer, writing below `url`."""
    first = context.recipe.model.init_weights
    return make_job(
        context,
        name=NAME,
        url=url,
        train=context.recipe.pretrain,
        interval=(0.0, 1.0),
        statistics=statistics,
        init_weights=None if first is None else storage.absolute(first),
        memory_bytes=worker_bytes(context.recipe, context.recipe.pretrain),
    )


def _content_hash(url: str | None) -> str | None:
    if url is None:
        return None
    with storage.local_path(url) as path, path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def measure(context: RecipeContext) -> LatentStatistics:
    """Measure latent statistics on augmented and degraded crops of the training photographs."""
    recipe = context.recipe
    images = [image for _, image, _ in read_images(shards_of(context, "train"), STATISTICS_CROPS)]
    rng = np.random.default_rng([recipe.seed, STATISTICS_CROPS])
    crops = [augment(images[i % len(images)], recipe.pretrain.crop_px, recipe.augmentation, rng) for i in range(STATISTICS_CROPS)]
    pairs = [degrade_pair(crop, recipe.model.scale, recipe.degradation, rng) for crop in crops]
    hr, lr = (to_pixels(torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2)) for part in zip(*pairs, strict=True))
    return measure_statistics(model_config(context), hr, lr)
