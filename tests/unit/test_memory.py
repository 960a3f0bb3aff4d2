"""The memory plan against bytes that were counted while the real network ran, and what it decides."""

import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from linearsr.bundle import save_bundle
from linearsr.config import BackboneConfig, CodecConfig, LatentStatistics, ModelConfig, SamplerConfig
from linearsr.memory import MemoryModel, PictureTooLarge, free_bytes
from linearsr.model import SuperResolver
from linearsr.residency import expert_parameters
from linearsr.upscaler import Upscaler


class LiveBytes(TorchDispatchMode):
    """Counts bytes of the storages that are alive, and their most; those that were there before do not count."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.known and storage._cdata not in inputs:
                    self.known.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def freed(self, key, size):
        self.known.discard(key)
        self.live -= size


def make_bundle(folder, *, width=64, factor=8, prior="lr", precision="float32", blocks=2, kind="euler"):
    config = ModelConfig(
        codec=CodecConfig(factor=factor), backbone=BackboneConfig(width=width, num_blocks=blocks, caption_width=8), prior=prior
    )
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


def measured_peak(bundle, size_px, **options):
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
    ],
    ids=str,
)
@pytest.mark.parametrize("tile", [None, 16])
def test_the_plan_is_within_a_quarter_of_what_is_counted(tmp_path, shape, tile):
    bundle = make_bundle(tmp_path / "m", **shape)
    side = 32 * bundle.config.lr_pixels_per_token
    plan = MemoryModel.of(bundle).plan((side, side), 10**12, residency="all", tile=tile)
    assert plan.tiling.num_tiles == (1 if tile is None else 9)
    counted = measured_peak(bundle, (side, side), tile=tile, colour_fix="wavelet")
    assert plan.peak_bytes - plan.weight_bytes == pytest.approx(counted, rel=0.25)


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
    with pytest.raises(PictureTooLarge, match=r"got 0\.00 GB; expected .* in tiles of [0-9]+"):
        model.plan(size, 1000)


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
