"""pipelines/linearsr_x4.yaml is the paper's configuration, and presets have the parameters that their shapes say."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from linearsr.backbone import Backbone
from linearsr.conditioning import TextEmbedding
from linearsr.config import (
    BACKBONES,
    PAPER_BOUNDARIES,
    BackboneConfig,
    FlowConfig,
    ModelConfig,
    TagsConfig,
)
from linearsr.degradation_config import RealEsrganDegradation
from linearsr.experts import steps_per_expert
from linearsr.schedule import sampling_times
from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.recipe.notes import notes_on
from linearsr_platform.recipe.schema import TRAINING_STAGES, Recipe

RECIPE = Path(__file__).parents[2] / "pipelines" / "linearsr_x4.yaml"
STEM = 3 * 64 * 9 + 64 + 64 * 128 * 9 + 128 + 128 * 32 * 9 + 32


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(str(RECIPE)).recipe


def on_meta(shape: BackboneConfig, *, channels: int, pixels_per_token: int, tags: int = 0) -> Backbone:
    with torch.device("meta"):
        return Backbone(shape, latent_channels=channels, lr_pixels_per_token=pixels_per_token, num_tags=tags)


def count(network: Backbone, *without: str) -> int:
    return sum(weight.numel() for name, weight in network.named_parameters() if not name.startswith(without))


def written_out(shape: BackboneConfig, *, channels_in: int, channels_out: int) -> int:
    """Parameters from shapes alone, stem and tag embeddings left out. Source: method.md 2.1, 2.2, 2.5, 2.6."""
    width = shape.width
    blocks = shape.num_blocks * (31 * width**2 // 2 + 66 * width)
    caption = shape.caption_width * width + width + width**2 + width + width
    time = 256 * width + width + width**2 + width + 6 * width**2 + 6 * width
    return blocks + caption + time + channels_in * width + width + 2 * width + width * channels_out + channels_out


@pytest.mark.parametrize("name", BACKBONES)
def test_presets_have_exactly_the_parameters_of_their_shapes(name: str) -> None:
    shape = BACKBONES[name]
    network = on_meta(shape, channels=32, pixels_per_token=8)
    assert count(network, "stem.", "tags.table.") == written_out(shape, channels_in=32 + shape.stem_width, channels_out=32)
    assert count(network, "stem.") - count(network, "stem.", "tags.table.") == shape.caption_width  # the embedding of no tags
    assert count(network) - count(network, "stem.") == STEM == 112_544


@pytest.mark.parametrize(("name", "total"), [("nano", 0.37), ("tiny", 20.02), ("sana-600m", 591.90), ("sana-1600m", 1604.65)])
def test_presets_have_the_size_that_their_table_says(name: str, total: float) -> None:
    assert round(count(on_meta(BACKBONES[name], channels=32, pixels_per_token=8)) / 1e6, 2) == total


def test_the_papers_network_builds_without_memory_and_runs_a_crop(recipe: Recipe) -> None:
    section = recipe.model
    config = ModelConfig(
        scale=section.scale,
        codec=section.codec,
        backbone=section.resolved_backbone,
        flow=section.flow,
        tags=TagsConfig(encoder="text", dropout=section.tag_dropout, from_lr=section.tags_from_lr),
        prior=section.prior,
    )
    channels, pixels = config.codec.latent_channels, config.lr_pixels_per_token
    with torch.device("meta"):
        network = Backbone(config.backbone, latent_channels=channels, lr_pixels_per_token=pixels, caption_encoder=config.tags.encoder)
    without_ours = count(network, "stem.")
    assert round(without_ours / 1e6, 2) == 1604.53  # method.md 2.1, "params with 64-ch input"
    assert count(network) == without_ours + STEM
    side = recipe.pretrain.crop_px // config.codec.factor
    lr = torch.empty(1, 3, recipe.pretrain.crop_px // config.scale, recipe.pretrain.crop_px // config.scale, device="meta")
    z = torch.empty(1, 32, side, side, device="meta")
    assert section.text is not None
    values, mask = (
        torch.empty(1, section.text.max_tokens, 2304, device="meta"),
        torch.ones(1, section.text.max_tokens, dtype=torch.bool, device="meta"),
    )
    text = TextEmbedding(values, mask)
    assert network(z, torch.empty(1, device="meta"), network.prepare(lr, text)).shape == (1, 32, 32, 32)


def test_it_says_what_the_paper_says(recipe: Recipe) -> None:
    assert recipe.experts.resolved_boundaries == pytest.approx(PAPER_BOUNDARIES, abs=5e-4)
    assert (recipe.model.scale, recipe.model.preset, recipe.model.prior, recipe.model.codec.factor) == (4, "sana-1600m", "none", 32)
    assert recipe.model.flow == FlowConfig(shift=3.0)
    assert recipe.degradation == RealEsrganDegradation(gt_usm=False)
    for key in TRAINING_STAGES:
        stage = recipe.training_stage(key)
        assert (stage.crop_px, stage.precision, stage.clip_norm, stage.schedule) == (1024, "bfloat16", 0.1, "constant"), key
        assert stage.knee.stop, key
        assert stage.guard.enabled, key
        assert len(stage.knee.metrics) == 5, key
    assert [recipe.training_stage(key).lr for key in TRAINING_STAGES] == [5e-5, 2e-5, 1e-5]
    assert recipe.pretrain.warmup_steps == 2000
    assert steps_per_expert(sampling_times(recipe.sampler, 3.0), recipe.experts.resolved_boundaries) == (4, 2, 13, 1)
    assert notes_on(recipe) == ()


def test_check_passes_where_an_autoencoder_is(tmp_path: Path) -> None:
    autoencoder = pytest.importorskip("diffusers").AutoencoderDC(
        attention_head_dim=8,
        encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        encoder_block_out_channels=(8, 8, 16, 16, 32, 32),
        decoder_block_out_channels=(8, 8, 16, 16, 32, 32),
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        scaling_factor=0.41407,
    )
    autoencoder.save_pretrained(tmp_path / "dc-ae")
    command = "from linearsr_platform.cli.app import main; main()"
    arguments = [sys.executable, "-c", command, "check", str(RECIPE), "--set", f"model.codec.source={tmp_path}/dc-ae"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "at most 224000 steps, 2 workers, ZeRO 2" in done.stdout


def test_every_number_of_a_stage_has_its_source() -> None:
    lines = RECIPE.read_text().splitlines()
    start, end = lines.index("pretrain:"), next(i for i, line in enumerate(lines) if line.startswith("# Stage 2"))
    bare, covered = [], False
    for line in lines[start + 1 : end]:
        if line.lstrip().startswith("#"):
            covered = True
        elif line.strip():
            sourced = covered or any(mark in line for mark in ("[P]", "[S]", "[C]"))
            bare += [] if sourced or line.strip() == "knee:" else [line]
        else:
            covered = False
    assert bare == []
