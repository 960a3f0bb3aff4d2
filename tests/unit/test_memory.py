"""The memory plan against bytes that were counted while the real network ran, and what it decides."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from autoencoders import SANA, write_autoencoder

from linearsr.blocks import MixFFN
from linearsr.bundle import save_bundle
from linearsr.codec_memory import CodecMemory
from linearsr.codec_source import CodecError
from linearsr.config import BACKBONES, BackboneConfig, CodecConfig, LatentStatistics, ModelConfig, SamplerConfig
from linearsr.live_bytes import LiveBytes
from linearsr.memory import MemoryModel, PictureTooLarge, free_bytes
from linearsr.model import SuperResolver
from linearsr.residency import expert_parameters
from linearsr.upscaler import Upscaler
from linearsr_platform.stages.upscaling import Outcome, describe


def make_bundle(folder, *, width=64, factor=8, prior="lr", precision="float32", blocks=2, kind="euler", codec=None, qk_norm=False):
    codec = codec or CodecConfig(factor=factor)
    backbone = BackboneConfig(width=width, num_blocks=blocks, caption_width=8, qk_norm=qk_norm)
    config = ModelConfig(codec=codec, backbone=backbone, prior=prior)
    channels = config.codec.latent_channels
    statistics = LatentStatistics(mean=(0.0,) * channels, std=(1.0,) * channels, residual_std=(0.1,) * channels)
    folder.mkdir()
    save_file(SuperResolver(config, statistics).state_dict(), folder / "w.safetensors")
    return save_bundle(
        folder / "bundle",
        config=config,
        statistics=statistics,
        boundaries=(0.5,),
        sampler=SamplerConfig(kind=kind, num_steps=4),
        expert_weights=[folder / "w.safetensors"] * 2,
        lineage={},
        precision=precision,
    )


def dc_ae(folder, tile):
    return CodecConfig(kind="dc-ae", factor=32, source=str(write_autoencoder(folder / "dcae")), tile=tile)


def measured_peak(bundle, size_px, **options):
    """Return bytes counted over one enlargement, a DC-AE's weights included."""
    upscaler, lr = Upscaler(bundle), torch.rand(1, 3, *size_px)
    with LiveBytes() as counted:
        upscaler.upscale_tensor(lr, **options)
    return counted.peak


@pytest.mark.parametrize(
    "shape",
    [
        {"width": 384, "factor": 8},
        {"width": 64, "factor": 4},
        {"width": 256, "factor": 16, "prior": "none", "kind": "dpm++2m"},
        {"width": 256, "factor": 8, "precision": "bfloat16"},
        {"width": 256, "factor": 8, "precision": "bfloat16", "instructions": True},
        {"width": 384, "factor": 8, "qk_norm": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("tile", [None, 16])
def test_the_plan_is_within_a_quarter_of_what_is_counted(monkeypatch, tmp_path, shape, tile):
    shape = dict(shape)
    has_instructions = shape.pop("instructions", False)
    monkeypatch.setattr("linearsr.linear._has_instructions", lambda half: has_instructions)
    bundle = make_bundle(tmp_path / "m", **shape)
    side = 32 * bundle.config.lr_pixels_per_token
    plan = MemoryModel.of(bundle).plan((side, side), 10**12, residency="all", tile=tile, colour_fix="wavelet")
    assert plan.tiling.num_tiles == (1 if tile is None else 9)
    counted = measured_peak(bundle, (side, side), tile=tile, colour_fix="wavelet")
    assert plan.peak_bytes - plan.weight_bytes == pytest.approx(counted, rel=0.25)


@pytest.mark.parametrize("prior", ["lr", "none"])
@pytest.mark.parametrize(
    ("tile", "size_px", "options", "widest"),
    [
        (16, (128, 96), {}, "codec"),
        (16, (128, 96), {"colour_fix": "wavelet"}, "codec"),
        (8, (160, 96), {}, "codec"),
        (8, (160, 160), {"tile": 16}, "codec"),
        (4, (160, 96), {}, "picture"),
        (4, (160, 96), {"colour_fix": "adain"}, "picture"),
        (4, (160, 96), {"colour_fix": "wavelet"}, "picture"),
    ],
    ids=str,
)
def test_the_plan_with_a_dc_ae_is_within_a_quarter_of_what_is_counted(tmp_path, prior, tile, size_px, options, widest):
    bundle = make_bundle(tmp_path / "m", prior=prior, codec=dc_ae(tmp_path, tile))
    plan = MemoryModel.of(bundle).plan(size_px, 10**12, residency="all", **options)
    parts = {"network": plan.network_bytes, "picture": plan.picture_bytes, "codec": plan.codec_bytes}
    assert max(parts, key=parts.get) == widest
    counted = measured_peak(bundle, size_px, **options)
    experts = plan.weight_bytes - plan.codec_weight_bytes
    assert plan.peak_bytes - experts == pytest.approx(counted, rel=0.25)


def test_the_plan_of_a_wide_network_over_a_dc_ae_is_within_a_quarter_of_what_is_counted(tmp_path):
    bundle = make_bundle(tmp_path / "m", width=768, blocks=1, codec=dc_ae(tmp_path, 4))
    plan = MemoryModel.of(bundle).plan((160, 160), 10**12, residency="all")
    assert plan.network_bytes > max(plan.codec_bytes, plan.picture_bytes)
    experts = plan.weight_bytes - plan.codec_weight_bytes
    assert plan.peak_bytes - experts == pytest.approx(measured_peak(bundle, (160, 160)), rel=0.25)


def test_sanas_codec_makes_a_picture_that_would_fit_go_in_tiles_or_not_at_all():
    config = ModelConfig(codec=CodecConfig(kind="dc-ae", factor=32, source="dc-ae"), backbone=BACKBONES["sana-1600m"], prior="lr")
    without = MemoryModel(config=config, num_experts=4, expert_parameters=1_605_000_000, dtype_bytes=4, device_type="cuda")
    codec = CodecMemory.counted(SANA, config.codec.tile)
    counted = replace(without, codec=codec)
    size = (1536, 1536)
    room = without.plan(size, 10**12, residency="one").peak_bytes
    assert without.plan(size, room).tile is None
    plan = counted.plan(size, room)
    assert (plan.tile is None, plan.residency) == (False, "one")
    assert plan.codec_weight_bytes == codec.weight_bytes == plan.weight_bytes - without.weights("one")
    # The network of one small tile would still fit where one of the codec's does not.
    tight = without.plan(size, 10**12, residency="one", tile=16).peak_bytes
    assert without.plan(size, tight).tile is not None
    weights, work = codec.weight_bytes / 1e9, plan.codec_bytes / 1e9
    with pytest.raises(
        PictureTooLarge,
        match=rf"tokens in tiles of 16 \(.*, {weights:.2f} GB of them the codec's, .*, codec {work:.2f} GB in tiles of 31 x 31\)",
    ):
        counted.plan(size, tight)


@pytest.mark.parametrize(("missing", "fits"), [(0.05, True), (0.99, False)])
def test_a_picture_that_the_codec_makes_too_large_is_refused_with_the_largest_tile_of_it_that_fits(missing, fits):
    config = ModelConfig(codec=CodecConfig(kind="dc-ae", factor=32, source="dc-ae"), backbone=BACKBONES["sana-1600m"], prior="lr")
    codec = CodecMemory.counted(SANA, config.codec.tile)
    model = MemoryModel(config=config, num_experts=4, expert_parameters=1_605_000_000, dtype_bytes=4, codec=codec)
    size = (1536, 1536)
    least = model.plan(size, 10**12, residency="one", tile=16)
    assert least.codec_bytes > max(least.network_bytes, least.picture_bytes)
    budget = least.peak_bytes - int(missing * least.codec_bytes)
    with pytest.raises(PictureTooLarge) as caught:
        model.plan(size, budget)
    advised = re.search(r"a smaller picture, --codec-tile (\d+), which changes the picture, or --memory", str(caught.value))
    assert (advised is not None) == fits
    if advised is None:
        assert "a smaller picture, or --memory" in str(caught.value)
        return
    tile = int(advised[1])
    assert replace(model, codec=replace(codec, tile=tile)).plan(size, budget).codec_tile < least.codec_tile
    with pytest.raises(PictureTooLarge):
        replace(model, codec=replace(codec, tile=tile + 1)).plan(size, budget)


def test_a_gpu_holds_mix_ffn_whole():
    # The meta device takes the same way: all tokens at once.
    shape = BackboneConfig(width=64, num_blocks=1, ffn_ratio=8)
    model = MemoryModel(config=ModelConfig(backbone=shape), num_experts=1, expert_parameters=0, dtype_bytes=2, device_type="cuda")
    with torch.device("meta"), torch.inference_mode():
        layer, tokens = MixFFN(shape.width, shape.ffn_width).to(torch.bfloat16), torch.empty(1, 1024, shape.width, dtype=torch.bfloat16)
        with LiveBytes() as counted:
            layer(tokens, (32, 32))
    beside = (2 * shape.width + model.config.codec.latent_channels + 2 * shape.stem_width) * 2
    assert model.activations((32, 32)) / 1024 - beside == counted.peak / 1024


@pytest.mark.parametrize(("device", "experts", "resident"), [("cuda", 1, 1), ("cuda", 4, 2), ("cpu", 1, 1), ("cpu", 4, 1)])
def test_a_second_slot_is_for_another_expert_on_its_way_to_a_gpu(device, experts, resident):
    model = MemoryModel(config=ModelConfig(), num_experts=experts, expert_parameters=1000, dtype_bytes=2, device_type=device)
    assert (model.weights("one"), model.weights("all")) == (2000 * resident, 2000 * experts)


@pytest.mark.parametrize("budget", [6 * 10**6, 20 * 10**6, 80 * 10**6])
def test_no_picture_larger_than_the_largest_fits_over_a_dc_ae(tmp_path, budget):
    bundle = make_bundle(tmp_path / "m", prior="lr", codec=dc_ae(tmp_path, 16))
    model = MemoryModel.of(bundle)
    largest = model.largest_whole_px(budget) // bundle.config.codec.factor
    unit = bundle.config.lr_pixels_per_token
    sides = {side for side in range(1, 80) if model.plan((side * unit, side * unit), 10**12).peak_bytes <= budget}
    assert largest == max(sides)


def test_a_dc_ae_that_is_not_there_is_not_counted_and_the_plan_says_so(tmp_path):
    codec = dc_ae(tmp_path, 16)
    bundle = make_bundle(tmp_path / "m", codec=codec)
    counted = MemoryModel.of(bundle).plan((64, 64), 10**12)
    Path(codec.source).rename(tmp_path / "elsewhere")
    plan = MemoryModel.of(bundle).plan((64, 64), 10**12)
    assert (counted.codec_counted, plan.codec_counted) == (True, False)
    assert (plan.codec_bytes, plan.codec_weight_bytes) == (0, 0)
    assert plan.weight_bytes == counted.weight_bytes - counted.codec_weight_bytes
    assert re.search(
        r"\(weights .* MB, 0\.9 MB of them the codec's, and the largest of network .* MB, codec 9\.6 MB whole\)$", describe(counted)
    )
    assert re.search(r"\(weights .* MB and the largest of .* MB; the DC-AE is not here and not counted\)$", describe(plan))
    told, without = (Outcome("a.png", "b.png", "planned", memory=one).as_json() for one in (counted, plan))
    names = ("codec_weight_bytes", "codec_bytes", "codec_tile", "codec_counted")
    assert [told[name] for name in names] == [counted.codec_weight_bytes, counted.codec_bytes, [8, 8], True]
    assert [without[name] for name in names] == [0, 0, None, False]
    with pytest.raises(CodecError, match=r"codec\.source: got '.*dcae'; expected a local folder"):
        Upscaler(bundle)


def test_memory_decides_between_whole_one_expert_at_a_time_and_tiles(tmp_path):
    model = MemoryModel.of(make_bundle(tmp_path / "m", width=256, factor=8, blocks=3))
    size = (256, 192)
    roomy = model.plan(size, 10**12)
    assert (roomy.tile, roomy.residency) == (None, "all")
    whole_in_turn = model.plan(size, roomy.peak_bytes - 1)
    assert (whole_in_turn.tile, whole_in_turn.residency) == (None, "one")
    cut_up = model.plan(size, whole_in_turn.peak_bytes - 1)
    assert cut_up.tiling.num_tiles > 1
    assert cut_up.peak_bytes <= cut_up.budget_bytes
    assert model.plan(size, 10**12, tile=32).tile == 32
    with pytest.raises(PictureTooLarge, match=r"got 0\.1 MB; expected .* MB for \d+ x \d+ tokens in tiles of 16 \(weights .* MB and"):
        model.plan(size, 100_000)


def test_the_largest_whole_picture_fits_and_a_larger_one_does_not(tmp_path):
    bundle = make_bundle(tmp_path / "m", width=64, factor=8)
    model, budget = MemoryModel.of(bundle), 100 * 10**6
    side = model.largest_whole_px(budget) // bundle.config.scale
    assert model.plan((side, side), budget, residency="all").tile is None
    more = side + bundle.config.lr_pixels_per_token
    assert model.plan((more, more), budget, residency="all").tile is not None


def test_parameters_are_counted_from_the_file_and_free_memory_is_a_number_of_bytes(tmp_path):
    bundle = make_bundle(tmp_path / "m")
    assert expert_parameters(bundle) == sum(
        value.numel() for value in SuperResolver(bundle.config, bundle.statistics).state_dict().values()
    )
    assert 10**7 < free_bytes(torch.device("cpu")) < 10**14


@pytest.mark.parametrize(
    ("names", "cached"),
    [
        (("memory.max", "memory.current", "memory.stat"), "inactive_file"),
        (("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"), "total_inactive_file"),
    ],
)
def test_files_that_were_read_take_no_memory_of_a_container(tmp_path, monkeypatch, names, cached):
    monkeypatch.setattr("linearsr.memory.CONTAINER_MEMORY", tmp_path)
    (tmp_path / "memory").mkdir()
    for name, text in zip(names, ("9000000\n", "8000000\n", f"anon 500000\n{cached} 7000000\n"), strict=True):
        (tmp_path / name).write_text(text)
    assert free_bytes(torch.device("cpu")) == 8_000_000
    (tmp_path / names[2]).unlink()
    assert free_bytes(torch.device("cpu")) == 1_000_000, "as gVisor says no more"
    (tmp_path / names[0]).write_text("max\n")
    assert free_bytes(torch.device("cpu")) > 9_000_000


@pytest.mark.parametrize(
    ("device", "size", "instructions", "absorbed"),
    [("cpu", 4, False, True), ("cpu", 2, False, True), ("cpu", 2, True, False), ("cuda", 4, True, True), ("cuda", 2, True, False)],
    ids=str,
)
def test_captions_are_counted_as_blocks_read_them(monkeypatch, device, size, instructions, absorbed):
    monkeypatch.setattr("linearsr.linear._has_instructions", lambda half: instructions)
    shape = BACKBONES["sana-1600m"]
    config = ModelConfig(codec=CodecConfig(factor=4), backbone=shape)
    model = MemoryModel(config=config, num_experts=1, expert_parameters=0, dtype_bytes=size, device_type=device, caption_tokens=80)
    each = shape.num_blocks * 2 * 80 * shape.width
    assert model.captions(1024) == each * (shape.num_cross_heads * 4 if absorbed else size)
    assert model.captions(64) < each * shape.num_cross_heads * 4
