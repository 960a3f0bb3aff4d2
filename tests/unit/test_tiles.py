"""Tiles: they cover the grid, feather to a partition of unity, and a tiled picture has no seams where they meet."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from linearsr.bundle import save_bundle
from linearsr.config import BackboneConfig, LatentStatistics, ModelConfig, SamplerConfig, TagsConfig
from linearsr.model import SuperResolver
from linearsr.tiles import Tiling, blend, cut, feather
from linearsr.timing import Stopwatch
from linearsr.upscaler import Upscaler

SIDES = st.integers(1, 70)


def make_bundle(folder, precision="float32"):
    """Random experts whose every part matters: a fresh network's output layer is zero."""
    backbone = BackboneConfig(width=32, num_blocks=2, head_width=16, num_cross_heads=2, caption_width=8, stem_width=8)
    config = ModelConfig(backbone=backbone, tags=TagsConfig(vocabulary=("cat",), max_tags=2), prior="lr")
    statistics = LatentStatistics(mean=(0.0,) * 48, std=(0.5,) * 48, residual_std=(0.1,) * 48)
    weights = []
    for index in range(4):
        torch.manual_seed(index)
        expert = SuperResolver(config, statistics)
        for parameter in expert.parameters():
            nn.init.normal_(parameter, std=0.1)
        weights.append(folder / f"{index}.safetensors")
        save_file(expert.state_dict(), weights[-1])
    return save_bundle(
        folder / "bundle",
        config=config,
        statistics=statistics,
        boundaries=(0.223, 0.875, 0.939),
        sampler=SamplerConfig(num_steps=8),
        expert_weights=weights,
        lineage={},
        precision=precision,
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("tiles"))


@settings(max_examples=100, deadline=None)
@given(height=SIDES, width=SIDES, side=st.integers(2, 40), data=st.data())
def test_tiles_cover_the_grid_overlap_enough_and_blend_to_what_they_are_given(height, width, side, data):
    overlap = data.draw(st.integers(0, side - 1))
    tiling = cut((height, width), side, overlap)
    for starts, size, total in zip(tiling.starts, tiling.side, tiling.grid, strict=True):
        assert starts[0] == 0
        assert starts[-1] + size == total
        assert all(a + size - b >= overlap for a, b in pairwise(starts))
    picture = torch.randn(1, 2, height, width, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(blend(tiling, lambda window: picture[..., *window]), picture, atol=1e-5, rtol=1e-5)


def test_feathers_rise_where_tiles_meet_and_nowhere_else():
    tiling = cut((8, 20), 8, 2)
    first = feather(tiling, next(tiling.windows()))
    assert torch.equal(first[0], torch.tensor([1.0, 1, 1, 1, 1, 1, 0.75, 0.25]))
    assert torch.equal(first, first[:1].expand(8, -1)), "one row of tiles: nothing to feather up and down"


@pytest.mark.parametrize(("grid", "side", "overlap"), [((4, 4), (5, 4), 0), ((9, 9), (4, 4), 4), ((9, 9), (0, 4), 1)])
def test_tiles_that_cannot_be_are_refused(grid, side, overlap):
    with pytest.raises(ValueError, match="tiling: got side"):
        Tiling(grid, side, overlap)


def scene():
    """Edges, smooth sky and noise: 64 x 56 LR pixels."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 56), indexing="ij")
    picture = torch.stack([rows, columns, (rows * 9).sin() * 0.3 + 0.5])
    picture[:, 30:50, 10:30] += 0.25 * torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0)) - 0.1
    return picture.clamp(0, 1)[None]


def test_one_tile_is_the_whole_picture_bit_for_bit_and_tiling_is_deterministic(bundle):
    upscaler, lr = Upscaler(bundle), scene()
    at_once = upscaler.upscale_tensor(lr, tags=["cat"], seed=3)
    assert torch.equal(upscaler.upscale_tensor(lr, tags=["cat"], seed=3, tile=64), at_once)
    tiled = upscaler.upscale_tensor(lr, tags=["cat"], seed=3, tile=24)
    assert torch.equal(upscaler.upscale_tensor(lr, tags=["cat"], seed=3, tile=24), tiled)
    assert not torch.equal(tiled, at_once), "linear attention is global: a tile's sums run over the tile only"


def step_energy_at_tile_edges(upscaler, tiling):
    """How much the tiled latent's difference to the whole one jumps where tiles begin or end, as a multiple of elsewhere; and its size."""
    noise = torch.randn((1, 48, 64, 56), generator=torch.Generator().manual_seed(3))
    pixels, ids = scene() * 2 - 1, torch.zeros(1, 2, dtype=torch.long)
    with torch.inference_mode():
        at_once, tiled = (upscaler.routed.sample(noise, pixels, ids, tiling=one) for one in (None, tiling))
        added = at_once - upscaler.space.prior_mean(pixels)
    steps = (tiled - at_once)[0].diff(dim=2).square().mean((0, 1))
    edges = {edge for start in tiling.starts[1] for edge in (start, start + tiling.side[1]) if 0 < edge < 56}
    on, off = ([float(steps[column - 1]) for column in range(1, 56) if (column in edges) is wanted] for wanted in (True, False))
    return np.mean(on) / np.mean(off), float((tiled - at_once).std() / added.std())


def test_feathered_tiles_have_no_seams_and_stay_near_the_whole_picture_where_hard_ones_show(bundle):
    upscaler = Upscaler(bundle)
    for side in (24, 32):
        seam, distance = step_energy_at_tile_edges(upscaler, cut((64, 56), side))
        assert seam < 2
        assert distance < 0.15, "tiles change a fraction of what the sampler adds: attention sums run over the tile only"
    hard, _ = step_energy_at_tile_edges(upscaler, Tiling((64, 56), (16, 14), 0))
    assert hard > 3, "the measure sees seams"


def test_noise_does_not_depend_on_tiles(bundle, monkeypatch):
    upscaler, seen = Upscaler(bundle), []
    run = upscaler.routed.sample

    def record(noise, *arguments, **tiles):
        seen.append(noise)
        return run(noise, *arguments, **tiles)

    monkeypatch.setattr(upscaler.routed, "sample", record)
    for tile in (None, 16, 24):
        upscaler.upscale_tensor(scene(), seed=5, tile=tile, steps=1)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_experts_in_turn_give_the_same_bits_and_every_switch_is_counted(tmp_path, precision):
    bundle = make_bundle(tmp_path, precision)
    pictures, counts = [], []
    for residency in ("all", "one"):
        watch = Stopwatch()
        upscaler = Upscaler(bundle, residency=residency, stopwatch=watch)
        pictures.append([upscaler.upscale_tensor(scene()[..., :24, :24], seed=seed, steps=20) for seed in (0, 1)])
        sections, _ = watch.report()
        counts.append({section.name: section.count for section in sections})
    assert all(torch.equal(a, b) for a, b in zip(*pictures, strict=True))
    assert counts[0] == counts[1]
    assert counts[0]["switch"] == 8  # Four experts a picture, each asked for once.
    # One more for the second than in method.md 3.7: the uniform grid meets .875 exactly, and a boundary belongs to the noisier expert.
    assert [counts[0][f"expert {index}"] for index in (1, 2, 3, 4)] == [2 * 4, 2 * 3, 2 * 12, 2 * 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_experts_in_turn_give_the_same_bits(bundle):
    upscalers = [Upscaler(bundle, device="cuda", residency=residency) for residency in ("all", "one")]
    for seed in (0, 1):
        first, second = (upscaler.upscale_tensor(scene()[..., :24, :24], seed=seed, steps=20) for upscaler in upscalers)
        assert torch.equal(first, second)
