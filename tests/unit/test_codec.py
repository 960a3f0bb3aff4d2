"""DC-AE through our loading code against diffusers' own, on a small autoencoder with random weights that diffusers saved."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from linearsr.bundle import BundleError, load_bundle, save_bundle
from linearsr.codec import make_codec
from linearsr.codec_source import CodecError, check_codec, codec_digest
from linearsr.config import AugmentationConfig, CodecConfig, DegradationConfig, FlowConfig, LatentStatistics, ModelConfig, SamplerConfig
from linearsr.dcae import _load, in_tiles
from linearsr.latent import LatentSpace
from linearsr.model import SuperResolver
from linearsr.statistics import measure_statistics
from linearsr.task import SuperResolutionTask
from linearsr.task_config import TaskConfig
from linearsr.upscaler import Upscaler
from linearsr_platform.recipe.identity import stable_hash
from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.stages import pretrain
from linearsr_platform.stages.context import RecipeContext
from linearsr_platform.stages.preflight import check_before_start
from linearsr_platform.train.processes import join_group
from linearsr_platform.train.snapshots import Snapshots

SCALING = 0.41407


@pytest.fixture(scope="module")
def reference():
    """Six stages as in SANA's: residual blocks, then linear attention; two hundred thousand weights instead of 312 million."""
    from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

    kinds, widths = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3, (8, 8, 16, 16, 32, 32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoencoderDC(
            attention_head_dim=8,
            encoder_block_types=kinds,
            decoder_block_types=kinds,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            encoder_layers_per_block=(1,) * 6,
            decoder_layers_per_block=(1,) * 6,
            scaling_factor=SCALING,
        )
    return model.eval().requires_grad_(requires_grad=False)


@pytest.fixture
def folder(tmp_path, reference):
    reference.save_pretrained(tmp_path / "dcae")
    return tmp_path / "dcae"


def config_of(folder: Path | str, tile: int = 32) -> CodecConfig:
    return CodecConfig(kind="dc-ae", factor=32, source=str(folder), tile=tile)


def model_config(folder: Path, **settings) -> ModelConfig:
    return ModelConfig(codec=config_of(folder, tile=8), **settings)


def change_one_weight(folder: Path) -> None:
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_in.bias"][0] += 1
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")


def photograph(*sides: int) -> Tensor:
    """Smooth content and some noise, in [-1, 1], as a batch of one."""
    small = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(1)) * 2 - 1
    smooth = torch.nn.functional.interpolate(small, sides, mode="bicubic", antialias=True)
    return (smooth + 0.05 * torch.randn(smooth.shape, generator=torch.Generator().manual_seed(2))).clamp(-1, 1)


def test_it_codes_as_diffusers_does(folder, reference) -> None:
    codec, pixels = pickle.loads(pickle.dumps(make_codec(config_of(folder)))), photograph(96, 64)
    state = torch.get_rng_state()
    with torch.inference_mode():
        latent = codec.encode(pixels)
    assert torch.equal(latent, reference.encode(pixels).latent)
    assert latent.shape == (1, 32, 3, 2)
    assert torch.equal(codec.decode(latent), reference.decode(latent).sample)
    assert torch.equal(torch.get_rng_state(), state)
    batch = torch.cat([pixels, -pixels, pixels / 2])
    torch.testing.assert_close(codec.encode(batch), reference.encode(batch).latent)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = codec.encode(pixels.bfloat16())
    assert torch.equal(rounded, reference.encode(pixels.bfloat16().float()).latent)
    with pytest.raises(ValueError, match="got a picture of 96 x 65 px; expected multiples of 32"):
        codec.encode(photograph(96, 65))


def test_weights_are_read_once_and_only_when_needed(folder) -> None:
    before = _load.cache_info().misses
    codecs = [make_codec(config_of(folder, tile)) for tile in (8, 16)]
    assert _load.cache_info().misses == before
    for codec in codecs * 2:
        codec.decode(codec.encode(photograph(32, 32)))
    assert _load.cache_info().misses == before + 1


def test_weights_in_several_files_are_the_same_codec(tmp_path, folder, reference) -> None:
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    pixels = photograph(64, 64)
    assert torch.equal(make_codec(config_of(tmp_path / "sharded")).encode(pixels), reference.encode(pixels).latent)


def test_the_digest_is_of_the_function_and_not_of_the_place(tmp_path, folder) -> None:
    digest = codec_digest(config_of(folder))
    shutil.copytree(folder, tmp_path / "copy")
    settings = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**settings, "_diffusers_version": "0"}))
    assert codec_digest(config_of(tmp_path / "copy", tile=8)) == digest
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**settings, "scaling_factor": 0.4}))
    assert codec_digest(config_of(tmp_path / "copy")) != digest
    pixels = torch.zeros(1, 32, 1, 1)
    before = make_codec(config_of(folder)).decode(pixels)
    change_one_weight(folder)
    assert codec_digest(config_of(folder)) != digest
    assert not torch.equal(make_codec(config_of(folder)).decode(pixels), before)
    embedded = {codec_digest(CodecConfig(kind=kind, factor=factor)) for kind in ("haar", "space_to_depth") for factor in (2, 4)}
    assert len(embedded) == 4


def test_a_hub_id_is_looked_up_in_the_local_cache_and_never_fetched(tmp_path, folder, reference, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(CodecError, match=r"got 'owner/dcae'; expected .* in the local cache; fix: .*`hf download owner/dcae`"):
        make_codec(config_of("owner/dcae"))
    snapshot = tmp_path / "hub" / "models--owner--dcae" / "snapshots" / "0123abcd"
    shutil.copytree(folder, snapshot)
    (tmp_path / "hub" / "models--owner--dcae" / "refs").mkdir()
    (tmp_path / "hub" / "models--owner--dcae" / "refs" / "main").write_text("0123abcd")
    pixels = photograph(32, 32)
    assert torch.equal(make_codec(config_of("owner/dcae")).encode(pixels), reference.encode(pixels).latent)
    assert codec_digest(config_of("owner/dcae")) == codec_digest(config_of(folder))


def rewrite(**changes):
    def change(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, **changes}))

    return change


DAMAGE = {
    "gone": (shutil.rmtree, "is not there"),
    "no settings": (lambda folder: (folder / "config.json").unlink(), "got no readable config.json"),
    "another class": (rewrite(_class_name="AutoencoderKL"), "got config.json of AutoencoderKL"),
    "other channels": (rewrite(latent_channels=16), "'latent channels': 16.*; expected 32 latent channels"),
    "another factor": (rewrite(decoder_block_out_channels=[8, 8]), "'factors'.*expected .* factor 32"),
    "no weights": (lambda folder: (folder / "diffusion_pytorch_model.safetensors").unlink(), "got no file diffusion_pytorch_model"),
    "index out of the folder": (
        lambda folder: (folder / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        r"got no file \.\./x\.safetensors",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_no_such_autoencoder_is_refused_before_weights_are_read(folder, name) -> None:
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(CodecError, match=f"codec.source: .*{message}.*fix: "):
        check_codec(config_of(folder))


def test_weights_of_another_network_are_refused(folder) -> None:
    rewrite(encoder_block_out_channels=[8, 8, 16, 16, 32, 64])(folder)
    with pytest.raises(CodecError, match=r"got weights that do not fit .*; expected those of its config\.json"):
        make_codec(config_of(folder)).encode(photograph(32, 32))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 30), (15, 8), (40, 23), (6, 65)])
def test_tiles_of_a_local_function_are_exact_and_bounded(height: int, width: int) -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(x.shape[0] * x.shape[2] * x.shape[3] // 4)
        return torch.nn.functional.avg_pool2d(x, 2).repeat_interleave(3, 2).repeat_interleave(3, 3)

    x = torch.randn(5, 2, 2 * height, 2 * width)
    tiled = in_tiles(function, x, tile=8, overlap=2, unit_in=2, unit_out=3)
    assert max(seen) <= 64
    torch.testing.assert_close(tiled, function(x))


def roughness(picture: Tensor, lines: list[int]) -> float:
    """Mean squared second difference across the given columns: what an edge or a kink adds to."""
    bend = picture[..., 2:] - 2 * picture[..., 1:-1] + picture[..., :-2]
    return float(bend[..., [line + side for line in lines for side in (-2, -1)]].square().mean())


def test_tiled_decoding_shows_no_seams(folder, reference) -> None:
    latent = reference.encode(photograph(256, 768)).latent
    whole = reference.decode(latent).sample
    tiled = make_codec(config_of(folder, tile=16)).decode(latent)
    cut = torch.cat([reference.decode(part).sample for part in latent.split(12, dim=3)], dim=3)
    # The second tile begins at position 8, the first ends at 16.
    edges = [32 * 8, 32 * 16]
    assert roughness(tiled, edges) == pytest.approx(roughness(whole, edges), rel=0.05)
    assert roughness(tiled - whole, edges) < 0.05 * roughness(cut - whole, [32 * 12])
    error = (tiled - whole).square().mean(dim=(0, 1, 2)) / whole.var()
    assert error.mean() < 0.02
    assert error[edges[0] : edges[1]].mean() < 1.5 * error.mean()
    encoded = make_codec(config_of(folder, tile=16)).encode(photograph(256, 768))
    assert (encoded - latent).square().mean() < 0.05 * latent.var()


def test_latents_are_scaled_as_sana_scales_them(folder, reference) -> None:
    pixels, lr = photograph(128, 128), photograph(32, 32)
    statistics = measure_statistics(model_config(folder), pixels, lr)
    latent = LatentSpace(model_config(folder), statistics).encode(pixels)
    torch.testing.assert_close(latent, SCALING * reference.encode(pixels).latent, rtol=1e-6, atol=0)
    decoded = LatentSpace(model_config(folder), statistics).decode(latent)
    torch.testing.assert_close(decoded, reference.decode(latent / SCALING).sample.clamp(-1, 1), rtol=0, atol=1e-5)
    measured = measure_statistics(model_config(folder, prior="lr"), pixels, lr)
    assert (measured.mean, measured.std) == (statistics.mean, statistics.std)
    space = LatentSpace(model_config(folder, prior="lr"), measured)
    residual = (space.encode(pixels) - space.prior_mean(lr)).square().mean(dim=(0, 2, 3)).sqrt()
    torch.testing.assert_close(residual, space.sigma.value.flatten(), rtol=1e-5, atol=1e-3)


def test_impossible_settings_are_refused() -> None:
    for settings, rule in (
        ({"kind": "dc-ae", "factor": 32}, "codec.source: got None; expected a local folder or a hub id"),
        ({"kind": "dc-ae", "source": "x"}, "codec.factor: got 4; expected 32 for dc-ae"),
        ({"kind": "haar", "source": "x"}, "codec.source: got 'x'; expected null for haar"),
    ):
        with pytest.raises(ValueError, match=rule):
            CodecConfig(**settings)
    with pytest.raises(ValueError, match="loss_weighting: got 'pixel'; expected latent for codec dc-ae"):
        ModelConfig(codec=config_of("x"), flow=FlowConfig(loss_weighting="pixel"))


@pytest.mark.parametrize("prior", ["none", "lr"])
def test_a_network_trains_on_its_latents_without_owning_them(folder, prior) -> None:
    config = model_config(folder, prior=prior)
    statistics = measure_statistics(config, photograph(64, 64), photograph(16, 16))
    settings = TaskConfig(
        model=config,
        statistics=statistics,
        interval=(0.0, 1.0),
        degradation=DegradationConfig(),
        augmentation=AugmentationConfig(),
        crop_px=64,
        validation_steps=1,
        metrics=("psnr_y",),
        codec_digest=codec_digest(config.codec),
    )
    task = SuperResolutionTask(settings)
    module, rng = task.build(), np.random.default_rng(0)
    assert not [name for name in module.state_dict() if not name.startswith("network.")]
    image = ((photograph(96, 96)[0].permute(1, 2, 0) + 1) * 127.5).numpy().astype(np.uint8)
    examples = [task.transform(image, [], rng) for _ in range(2)]
    batch = {name: torch.from_numpy(np.stack([example[name] for example in examples])) for name in examples[0]}
    loss, _ = task.loss(module, batch, torch.Generator().manual_seed(0))
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in module.parameters())
    assert module.network.head.weight.grad.abs().sum() > 0
    held_back = task.validation_example(image, [], 64, 0)
    assert held_back["noise"].shape == (32, 2, 2)
    assert task.validate(module, {name: torch.from_numpy(value)[None] for name, value in held_back.items()})["psnr_y"].isfinite().all()
    change_one_weight(folder)
    with pytest.raises(CodecError, match=f"expected {settings.codec_digest}"):
        SuperResolutionTask(settings)


def test_a_run_is_refused_without_the_codec_and_trained_again_with_another(tmp_path, folder) -> None:
    recipe = Path(__file__).parents[2] / "pipelines" / "smoke.yaml"
    settings = [f"storage={tmp_path}", "model.flow.loss_weighting=latent", f"model.codec={{kind: dc-ae, factor: 32, source: {folder}}}"]
    loaded = load_recipe(str(recipe), None, settings)
    context = RecipeContext(loaded=loaded, storage_url=str(tmp_path), display=None, open_cluster=lambda: None)
    check_before_start(loaded.recipe)
    before = stable_hash(pretrain.settings(context))
    assert stable_hash(pretrain.settings(context)) == before
    change_one_weight(folder)
    assert stable_hash(pretrain.settings(context)) != before
    shutil.rmtree(folder)
    with pytest.raises(CodecError, match=r"codec\.source: got '.*dcae'; expected a local folder"):
        check_before_start(loaded.recipe)


def test_snapshots_carry_the_hash_of_the_codec(tmp_path) -> None:
    join_group()
    snapshots = Snapshots(str(tmp_path), 3, last_step=None, codec="ab" * 32)
    snapshots.write(1, {"weight": torch.zeros(1)})
    with safe_open(snapshots.url(1), "pt") as file:
        assert file.metadata() == {"codec": "ab" * 32}


@pytest.fixture
def bundle_folder(tmp_path, folder):
    config = model_config(folder)
    statistics = LatentStatistics(mean=(0.0,) * 32, std=(1 / SCALING,) * 32, residual_std=(1.0,) * 32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expert = SuperResolver(config, statistics)
        torch.nn.init.normal_(expert.network.head.weight, std=0.02)
    save_file(expert.state_dict(), tmp_path / "expert.safetensors")
    save_bundle(
        tmp_path / "bundle",
        config=config,
        statistics=statistics,
        boundaries=(),
        sampler=SamplerConfig(num_steps=2),
        expert_weights=[tmp_path / "expert.safetensors"],
        lineage={},
    )
    return tmp_path / "bundle"


def test_a_bundle_upscales_with_its_codec_in_tiles(bundle_folder, folder) -> None:
    assert sorted(path.name for path in bundle_folder.iterdir()) == ["bundle.json", "expert-1.safetensors"]
    bundle = load_bundle(bundle_folder)
    assert (bundle.config.codec.source, bundle.codec_digest) == (str(folder), codec_digest(bundle.config.codec))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (66, 94, 3), dtype=np.uint8))
    tiled = np.asarray(Upscaler(bundle).upscale(picture)).astype(int)
    assert tiled.shape == (264, 376, 3)
    assert tiled.std() > 1
    whole = Upscaler(replace(bundle, config=replace(bundle.config, codec=config_of(folder))))
    # Tiles of seven positions, cut from a latent that is nearly noise: about the worst that tiles can do.
    assert np.corrcoef(np.asarray(whole.upscale(picture)).ravel(), tiled.ravel())[0, 1] > 0.9


def test_a_bundle_takes_no_other_codec(bundle_folder, folder, tmp_path) -> None:
    digest = load_bundle(bundle_folder).codec_digest
    folder.rename(tmp_path / "moved")
    with pytest.raises(CodecError, match=r"dcae'; expected a local folder"):
        Upscaler(load_bundle(bundle_folder))
    moved = load_bundle(bundle_folder, codec_source=str(tmp_path / "moved"))
    assert Upscaler(moved).bundle.config.codec.source == str(tmp_path / "moved")
    change_one_weight(tmp_path / "moved")
    (tmp_path / "moved").rename(folder)
    with pytest.raises(BundleError, match=rf"bundle\.json: codec .*dcae: got SHA-256 (?!{digest})\w+; expected {digest}; fix:"):
        load_bundle(bundle_folder)
    with pytest.raises(BundleError, match="expected a local folder"):
        load_bundle(bundle_folder, codec_source="nowhere")
