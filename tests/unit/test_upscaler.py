"""The upscaler on random weights: sizes, determinism, routing and the meaning of its two estimates."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from linearsr.bundle import BundleError, load_bundle, save_bundle
from linearsr.config import BackboneConfig, CodecConfig, LatentStatistics, ModelConfig, SamplerConfig, TagsConfig
from linearsr.experts import bisect_boundaries
from linearsr.model import SuperResolver
from linearsr.tags import encode_tags
from linearsr.upscaler import Upscaler

BACKBONE = BackboneConfig(width=32, num_blocks=1, head_width=16, num_cross_heads=2, caption_width=8, stem_width=4)


def make_upscaler(folder, *, factor=8, scale=2, prior="lr", precision="float32", boundaries=None, **sampler):
    config = ModelConfig(
        scale=scale,
        codec=CodecConfig(factor=factor),
        backbone=BACKBONE,
        tags=TagsConfig(vocabulary=("cat", "dog"), max_tags=2),
        prior=prior,
    )
    channels = config.codec.latent_channels
    statistics = LatentStatistics(mean=(0.0,) * channels, std=(0.5,) * channels, residual_std=(0.3,) * channels)
    boundaries = bisect_boundaries() if boundaries is None else boundaries
    folder.mkdir()
    weights = []
    for index in range(len(boundaries) + 1):
        torch.manual_seed(index)
        expert = SuperResolver(config, statistics)
        for parameter in expert.parameters():  # A fresh network may be a fixed function by design; these are not.
            nn.init.normal_(parameter, std=0.1)
        weights.append(folder / f"{index}.safetensors")
        save_file(expert.state_dict(), weights[-1])
    settings = {"num_steps": 8, **sampler}
    save_bundle(
        folder / "bundle",
        config=config,
        statistics=statistics,
        boundaries=boundaries,
        sampler=SamplerConfig(**settings),
        expert_weights=weights,
        lineage={},
        precision=precision,
    )
    return Upscaler(load_bundle(folder / "bundle"))


def photograph(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def calls_of(upscaler, monkeypatch):
    """Record (expert, t) at each network evaluation."""
    calls = []
    for index, expert in enumerate(upscaler.experts):

        def record(z, t, condition, index=index, denoise=expert.denoise):
            calls.append((index, float(t)))
            return denoise(z, t, condition)

        monkeypatch.setattr(expert, "denoise", record)
    return calls


@pytest.mark.parametrize("factor_scale", [(8, 2), (4, 4), (8, 1)])
@pytest.mark.parametrize("size", [(13, 7), (1, 1), (2, 9), (16, 8)])
def test_any_size_comes_back_exactly_scaled(tmp_path, factor_scale, size):
    upscaler = make_upscaler(tmp_path / "m", factor=factor_scale[0], scale=factor_scale[1], num_steps=2, boundaries=(0.875,))
    for estimate in ("routed", "one_step"):
        restored = upscaler.upscale(photograph(*size), estimate=estimate)
        assert restored.size == (size[0] * factor_scale[1], size[1] * factor_scale[1])
        assert restored.mode == "RGB"


def test_padding_mirrors_and_leaves_the_picture_where_it_was(tmp_path, monkeypatch):
    upscaler = make_upscaler(tmp_path / "m")  # A token covers 4 LR pixels.
    seen = []
    monkeypatch.setattr(
        upscaler.experts[0], "condition", lambda pixels, ids, run=upscaler.experts[0].condition: seen.append(pixels) or run(pixels, ids)
    )
    lr = torch.rand(1, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    upscaler.upscale_tensor(lr, estimate="one_step")
    expected = lr[:, :, [0, 1, 2, 3, 4, 5, 4, 3]][..., [0, 1, 2, 3, 4, 5, 6, 5]]
    torch.testing.assert_close(seen[0], expected * 2 - 1)


def test_the_same_seed_gives_the_same_picture_and_another_gives_another(tmp_path):
    upscaler, lr = make_upscaler(tmp_path / "m"), photograph(9, 10)
    first, state = np.array(upscaler.upscale(lr, seed=1)), torch.get_rng_state()
    torch.manual_seed(99)  # Global randomness is neither used nor touched.
    assert np.array_equal(first, np.array(upscaler.upscale(lr, seed=1)))
    assert not np.array_equal(first, np.array(upscaler.upscale(lr, seed=2)))
    torch.set_rng_state(state)


def test_every_step_is_served_by_the_expert_of_its_noise_level(tmp_path, monkeypatch):
    upscaler = make_upscaler(tmp_path / "m", num_steps=20)
    calls = calls_of(upscaler, monkeypatch)
    upscaler.upscale(photograph(8, 8))
    low, middle, high = bisect_boundaries()
    assert [t for _, t in calls] == pytest.approx(upscaler.routed.times())
    assert [index for index, _ in calls] == [3 if t < low else 2 if t < middle else 1 if t < high else 0 for _, t in calls]
    assert {index for index, _ in calls} == {0, 1, 2, 3}
    calls.clear()
    upscaler.upscale(photograph(8, 8), steps=3)
    assert len(calls) == 3


def test_explicit_times_are_used_and_guidance_evaluates_both_branches(tmp_path, monkeypatch):
    upscaler = make_upscaler(tmp_path / "m", num_steps=3, times=(1.0, 0.9, 0.1), guidance_scale=2.0)
    calls = calls_of(upscaler, monkeypatch)
    upscaler.upscale(photograph(8, 8), tags=["cat"])
    assert calls == [(0, 1.0), (0, 1.0), (1, 0.9), (1, 0.9), (3, 0.1), (3, 0.1)]


def test_guidance_without_tags_changes_nothing_and_with_tags_extrapolates(tmp_path):
    plain = make_upscaler(tmp_path / "plain", num_steps=1)
    guided = make_upscaler(tmp_path / "guided", num_steps=1, guidance_scale=2.0)
    lr = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    untagged = plain.upscale_tensor(lr)
    torch.testing.assert_close(guided.upscale_tensor(lr), untagged)
    torch.testing.assert_close(guided.upscale_tensor(lr, tags=["unheard of"]), untagged)
    tagged = plain.upscale_tensor(lr, tags=["Cat"])
    assert not torch.allclose(tagged, untagged, atol=1e-5)
    both = torch.stack([tagged, untagged])
    assert both.min() > 0.01, "a clamped value would not extrapolate"
    assert both.max() < 0.99, "a clamped value would not extrapolate"
    torch.testing.assert_close(guided.upscale_tensor(lr, tags=["cat"]), 2 * tagged - untagged, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prior", ["lr", "none"])
def test_one_step_is_the_noisiest_experts_estimate_at_pure_noise(tmp_path, prior):
    upscaler = make_upscaler(tmp_path / "m", prior=prior)
    lr = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    expert, ids = upscaler.experts[0], torch.from_numpy(encode_tags(["dog"], upscaler.bundle.config.tags)).expand(2, -1)
    noise = torch.randn(2, 3 * 64, 2, 3, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        direct = expert.space.decode(expert.denoise(noise, 1.0, expert.condition(lr * 2 - 1, ids))) / 2 + 0.5
    torch.testing.assert_close(upscaler.upscale_tensor(lr, tags=["dog"], seed=7, estimate="one_step"), direct)
    other = upscaler.upscale_tensor(lr, tags=["dog"], seed=8, estimate="one_step")
    # With the LR prior pure noise tells nothing, so the noise must not show.
    assert torch.allclose(direct, other, atol=1e-6) is (prior == "lr")


def test_temperature_scales_the_noise(tmp_path):
    cold = make_upscaler(tmp_path / "cold", temperature=0.0)
    lr = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cold.upscale_tensor(lr, seed=1), cold.upscale_tensor(lr, seed=2))


def test_bfloat16_runs_and_stays_near_float32(tmp_path):
    lr = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    full, half = (
        make_upscaler(tmp_path / p, precision=p).upscale_tensor(lr, estimate="one_step", tags=["cat"]) for p in ("float32", "bfloat16")
    )
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().max() < 0.1


def test_pictures_of_every_mode_are_taken(tmp_path):
    upscaler = make_upscaler(tmp_path / "m", num_steps=1)
    for mode in ("L", "RGBA", "P", "CMYK"):
        assert upscaler.upscale(photograph(5, 6).convert(mode)).size == (10, 12)


def test_bad_requests_and_foreign_weights_are_refused(tmp_path):
    upscaler = make_upscaler(tmp_path / "m")
    with pytest.raises(ValueError, match="routed, one_step"):
        upscaler.upscale(photograph(4, 4), estimate="both")
    with pytest.raises(ValueError, match="num_steps"):
        upscaler.upscale(photograph(4, 4), steps=0)
    save_file({"w": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    bundle = upscaler.bundle
    save_bundle(
        tmp_path / "foreign",
        config=bundle.config,
        statistics=bundle.statistics,
        boundaries=bundle.boundaries,
        sampler=bundle.sampler,
        expert_weights=[tmp_path / "foreign.safetensors"] * 4,
        lineage={},
    )
    with pytest.raises(BundleError, match=r"expert-1\.safetensors"):
        Upscaler(load_bundle(tmp_path / "foreign"))
