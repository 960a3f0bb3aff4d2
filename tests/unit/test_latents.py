"""Latents in shards: training takes them for what the codec would have made, and never those of another codec."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from linearsr.codec_source import codec_digest
from linearsr.config import AugmentationConfig, BackboneConfig, CodecConfig, DegradationConfig, LatentStatistics, ModelConfig
from linearsr.degradation_config import RealEsrganDegradation
from linearsr.task import PLAIN, SuperResolutionTask
from linearsr.task_config import TaskConfig
from linearsr_platform.data.extras import LatentMaker
from linearsr_platform.data.manifest import Manifest, load_manifest
from linearsr_platform.data.prepare import prepare
from linearsr_platform.data.reader import CropReader
from linearsr_platform.errors import RecipeErrors, UserError
from linearsr_platform.recipe.data_schema import DataConfig
from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.stages.context import RecipeContext, StageResult
from linearsr_platform.stages.prepare import settings, shards_of

SMOKE = Path(__file__).parents[2] / "pipelines" / "smoke.yaml"
PLAIN_YAML = "augmentation={flips: false, scales: [1.0, 1.0], colour: false}"
CODEC = CodecConfig()


def make_task(augmentation: AugmentationConfig = PLAIN) -> SuperResolutionTask:
    statistics = LatentStatistics(mean=(0.1,) * 48, std=(0.5,) * 48, residual_std=(0.4,) * 48)
    config = TaskConfig(
        model=ModelConfig(backbone=BackboneConfig(width=32, num_blocks=1, caption_width=8), codec=CODEC, prior="lr"),
        statistics=statistics,
        interval=(0.0, 1.0),
        degradation=DegradationConfig(),
        augmentation=augmentation,
        crop_px=32,
        validation_steps=1,
        metrics=("psnr_y",),
    )
    return SuperResolutionTask(config)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    (tmp_path / "in").mkdir()
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (65, 94, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"in/{seed}.png")
    data = DataConfig.model_validate({"sources": {"mine": {"url": str(tmp_path / "in")}}, "validation_px": 24, "min_side_px": 32})
    return prepare(data, recipe_folder=".", output_url=str(tmp_path / "out"), latents=LatentMaker(CODEC, codec_digest(CODEC)))


def test_the_loss_by_stored_latents_is_that_by_encoded_crops(manifest: Manifest, tmp_path: Path) -> None:
    task = make_task()
    shards = manifest.shard_urls(str(tmp_path / "out"), "train")
    batch = next(CropReader(shards, task.transform, batch_size=6, crops_per_image=4, seed=0))
    assert (batch["latent"].shape, batch["latent"].dtype) == ((6, 48, 8, 8), torch.float16)
    assert batch["hr"].shape == (6, 3, 32, 32)
    module = task.build()
    torch.nn.init.normal_(module.network.head.weight, std=0.1)
    pictures = {name: values for name, values in batch.items() if name != "latent"}
    losses = [task.loss(module, given, torch.Generator().manual_seed(1))[0] for given in (batch, pictures)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)
    assert losses[0] != losses[1]
    # It is the latent that is trained on, not the pixels.
    moved = task.loss(module, {**batch, "latent": batch["latent"] + 1}, torch.Generator().manual_seed(1))[0]
    assert not torch.isclose(moved, losses[0], rtol=0.1)


def test_a_latent_that_does_not_fit_is_refused() -> None:
    image, rng = np.zeros((40, 36, 3), np.uint8), np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"latent: got shape \(48, 9, 9\) for an image of 36x40 px"):
        make_task().transform(image, [], rng, np.zeros((48, 9, 9), np.float16))
    with pytest.raises(ValueError, match="at least 8 a side"):
        make_task().transform(image[:28], [], rng, np.zeros((48, 7, 9), np.float16))
    with pytest.raises(ValueError, match=r"augmentation: got .*flips=True.* with latents"):
        make_task(AugmentationConfig()).transform(image, [], rng, np.zeros((48, 10, 9), np.float16))
    task = make_task()
    sharpening = SuperResolutionTask(replace(task.config, degradation=RealEsrganDegradation()))
    with pytest.raises(ValueError, match=r"got a sharpened target with latents .* l1_gt_usm: false"):
        sharpening.transform(image, [], rng, np.zeros((48, 10, 9), np.float16))


def test_a_recipe_with_latents_and_augmentation_or_small_photographs_is_refused() -> None:
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(str(SMOKE), overrides=["data.latents=true", "data.min_side_px=16"])
    assert {error.key for error in caught.value.errors} == {"augmentation", "data.min_side_px"}
    plain = ["data.latents=true", "data.min_side_px=128", PLAIN_YAML]
    load_recipe(str(SMOKE), overrides=plain)
    # Training would aim at the pictures, and validation at their sharpened copies.
    with pytest.raises(RecipeErrors, match=r"degradation\.l1_gt_usm: .*not sharpened"):
        load_recipe(str(SMOKE), overrides=[*plain, "degradation={preset: stablesr}"])
    load_recipe(str(SMOKE), overrides=[*plain, "degradation={preset: stablesr, l1_gt_usm: false}"])
    load_recipe(str(SMOKE), overrides=[*plain, "degradation={preset: invsr}"])


def test_data_with_latents_of_another_codec_is_refused_and_prepared_again(manifest: Manifest, tmp_path: Path) -> None:
    def context(*overrides: str) -> RecipeContext:
        loaded = load_recipe(str(SMOKE), overrides=overrides)
        made = RecipeContext(loaded=loaded, storage_url=str(tmp_path), display=None, open_cluster=lambda: None)  # type: ignore[arg-type]
        url = str(tmp_path / "out")
        made.results["prepare"] = StageResult(stage="prepare", key="", url=url, summary="", seconds=0, run_id="", data={})
        return made

    assert load_manifest(str(tmp_path / "out")).latents is not None
    right, wrong = CodecConfig(kind="haar", factor=4), CodecConfig(kind="haar", factor=8)
    assert shards_of(context("model.codec={kind: haar, factor: 4}"), "train")
    with pytest.raises(UserError) as caught:
        shards_of(context("model.codec={kind: haar, factor: 8}"), "train")
    assert codec_digest(right) in str(caught.value)
    assert codec_digest(wrong) in str(caught.value)
    assert "--from prepare" in str(caught.value)
    # The codec decides the data only if latents are part of it.
    on = ["data.latents=true", "data.min_side_px=128", PLAIN_YAML]
    codecs = ["model.codec={kind: haar, factor: 4}", "model.codec={kind: haar, factor: 8}"]
    assert settings(context(codecs[0])) == settings(context(codecs[1])) == settings(context("data.parallel_from=3"))
    assert settings(context(*on, codecs[0])) != settings(context(*on, codecs[1]))
