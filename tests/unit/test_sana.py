"""SANA's weights in our network: the same output as diffusers' own model, and the same bits on the way back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from linearsr.backbone import Backbone
from linearsr.conditioning import TextEmbedding
from linearsr.config import BACKBONES, BackboneConfig
from linearsr.sana import EXTRA_WEIGHTS, SanaError, SanaModel, export_diffusers, from_diffusers, import_sana, read_network, read_sana

diffusers = pytest.importorskip("diffusers", reason="the extra `sana`")

LATENT = 5


def sana(**overrides: Any) -> Any:
    """Diffusers' own model, small, with weights as large as trained ones have them: nothing is zero or one."""
    config = {
        "in_channels": LATENT, "out_channels": LATENT, "num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 2,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 10,
    }  # fmt: skip
    model = diffusers.SanaTransformer2DModel(**{**config, **overrides}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def ours(model: Any, shape: BackboneConfig) -> Backbone:
    network = Backbone(shape, latent_channels=model.config.in_channels, lr_pixels_per_token=2, caption_encoder="text")
    stem = {f"stem.{name}": value for name, value in network.stem.state_dict().items()}
    network.load_state_dict({**from_diffusers(model.state_dict(), shape), **stem})
    return network.eval()


@torch.no_grad()
def outputs(model: Any, network: Backbone, z: Tensor, text: TextEmbedding, t: Tensor) -> tuple[Tensor, Tensor]:
    theirs = model(z, text.values, 1000 * t, encoder_attention_mask=text.mask, return_dict=False)[0]
    lr = torch.rand(z.shape[0], 3, 2 * z.shape[2], 2 * z.shape[3])
    return network(z, t, network.prepare(lr, text)), theirs


def error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("library", ["torch's", "the fastest"])
@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 4), head_width=st.sampled_from([4, 8, 12]), cross_heads=st.sampled_from([1, 2, 4]), blocks=st.integers(1, 3),
    ratio=st.sampled_from([1.0, 2.5, 3.3]), caption=st.integers(1, 20), latent=st.integers(1, 9), qk_norm=st.booleans(),
    batch=st.integers(1, 3), height=st.integers(1, 7), width=st.integers(1, 7), tokens=st.integers(1, 9), padded=st.booleans(),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_our_network_equals_diffusers_at_any_size(
    library: str, heads: int, head_width: int, cross_heads: int, blocks: int, ratio: float, caption: int, latent: int, qk_norm: bool,
    batch: int, height: int, width: int, tokens: int, padded: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    channels = heads * head_width
    model = sana(
        in_channels=latent, out_channels=latent, num_attention_heads=heads, attention_head_dim=head_width, num_layers=blocks,
        num_cross_attention_heads=cross_heads, cross_attention_head_dim=channels // cross_heads, cross_attention_dim=channels,
        caption_channels=caption, mlp_ratio=ratio, qk_norm="rms_norm_across_heads" if qk_norm else None,
    )  # fmt: skip
    shape = BackboneConfig(
        width=channels, num_blocks=blocks, head_width=head_width, num_cross_heads=cross_heads, ffn_ratio=ratio, caption_width=caption,
        stem_width=3, qk_norm=qk_norm,
    )  # fmt: skip
    mask = torch.rand(batch, tokens) < (0.6 if padded else 1)
    mask[:, torch.randint(tokens, ())] = True
    text = TextEmbedding(torch.randn(batch, tokens, caption), mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("linearsr.linear.MIN_PRODUCTS", 1 << 40 if library == "torch's" else 0)
        got, expected = outputs(model, ours(model, shape), torch.randn(batch, latent, height, width), text, torch.rand(batch))
    assert error(got, expected) <= 1e-5


def test_gradients_equal_those_of_diffusers() -> None:
    torch.manual_seed(0)
    model = sana()
    shape = BackboneConfig(width=24, num_blocks=2, head_width=8, num_cross_heads=2, caption_width=10, stem_width=3)
    network = ours(model, shape)
    z, t = torch.randn(2, LATENT, 3, 5), torch.rand(2)
    text = TextEmbedding(torch.randn(2, 4, 10), torch.tensor([[True, True, True, False], [True, False, False, False]]))
    weights = torch.randn(2, LATENT, 3, 5)
    (model(z, text.values, 1000 * t, encoder_attention_mask=text.mask, return_dict=False)[0] * weights).sum().backward()
    (network(z, t, network.prepare(torch.rand(2, 3, 6, 10), text)) * weights).sum().backward()
    expected = from_diffusers({name: value.grad for name, value in model.named_parameters()}, shape)
    got = {name: value.grad for name, value in network.named_parameters() if name in expected}
    got["embed.weight"] = torch.cat([got["embed.weight"][:, :LATENT], torch.zeros(24, 3)], dim=1)
    # A key's bias shifts all scores of a query alike, so its true gradient is zero, and what is left of it is rounding.
    keys = {name for name in expected if name.endswith("cross.key_value.bias")}
    assert {name: error(got[name], expected[name]) for name in expected.keys() - keys if error(got[name], expected[name]) > 1e-4} == {}
    assert all(error(got[name][24:], expected[name][24:]) <= 1e-4 for name in keys)


@pytest.mark.parametrize(("name", "heads", "layers", "cross"), [("sana-600m", 36, 28, 16), ("sana-1600m", 70, 20, 20)])
def test_published_sizes_have_the_parameters_of_diffusers(name: str, heads: int, layers: int, cross: int) -> None:
    width = 32 * heads
    with torch.device("meta"):
        model = diffusers.SanaTransformer2DModel(
            num_attention_heads=heads, num_layers=layers, num_cross_attention_heads=cross, cross_attention_head_dim=width // cross,
            cross_attention_dim=width,
        )  # fmt: skip
        network = Backbone(BACKBONES[name], latent_channels=32, lr_pixels_per_token=8, caption_encoder="text")
    converted = from_diffusers(model.state_dict(), BACKBONES[name])
    expected = {key: value.shape for key, value in network.state_dict().items() if not key.startswith("stem.")}
    assert {key: value.shape for key, value in converted.items()} == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_a_round_trip_gives_the_same_bits(tmp_path: Path, dtype: torch.dtype, shard_size: str) -> None:
    model = sana(qk_norm="rms_norm_across_heads", sample_size=7).to(dtype)
    model.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size=shard_size)
    files = list((tmp_path / "pipeline" / "transformer").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_size == "20KB")
    import_sana(tmp_path / "pipeline", tmp_path / "ours", stem_width=3, lr_pixels_per_token=2)
    export_diffusers(read_network(tmp_path / "ours"), tmp_path / "back")
    again = diffusers.SanaTransformer2DModel.from_pretrained(tmp_path / "back", torch_dtype=dtype)
    assert same_bits(dict(again.state_dict()), dict(model.state_dict()))
    assert {key: value for key, value in again.config.items() if not key.startswith("_")} == {
        key: value for key, value in model.config.items() if not key.startswith("_")
    }
    import_sana(tmp_path / "back", tmp_path / "twice", stem_width=3, lr_pixels_per_token=2)
    assert same_bits(load_file(tmp_path / "twice" / "network.safetensors"), load_file(tmp_path / "ours" / "network.safetensors"))


def test_before_training_the_lr_image_has_no_effect_and_its_columns_get_a_gradient(tmp_path: Path) -> None:
    model = sana()
    model.save_pretrained(tmp_path / "sana")
    imported = import_sana(tmp_path / "sana", tmp_path / "ours", stem_width=4, lr_pixels_per_token=8)
    network = Backbone(imported.shape, latent_channels=LATENT, lr_pixels_per_token=8, caption_encoder="text")
    network.load_state_dict(imported.weights)
    z, t, text = torch.randn(1, LATENT, 2, 3), torch.tensor([0.7]), TextEmbedding(torch.randn(1, 4, 10), torch.ones(1, 4, dtype=torch.bool))
    dark, bright = (network(z, t, network.prepare(torch.full((1, 3, 16, 24), level), text)) for level in (-1.0, 1.0))
    assert torch.equal(dark, bright)
    assert error(dark, model(z, text.values, 1000 * t, return_dict=False)[0]) <= 1e-5
    bright.square().mean().backward()
    assert network.embed.weight.grad[:, LATENT:].abs().max() > 0


def test_an_export_of_a_trained_network_takes_the_latent_and_the_stem_side_by_side(tmp_path: Path) -> None:
    shape = BackboneConfig(width=24, num_blocks=2, head_width=8, num_cross_heads=2, caption_width=10, stem_width=4)
    network = Backbone(shape, latent_channels=LATENT, lr_pixels_per_token=1, caption_encoder="text")
    torch.nn.init.normal_(network.head.weight)
    rest = export_diffusers(SanaModel(shape, LATENT, dict(network.state_dict()), {}), tmp_path / "out")
    model = diffusers.SanaTransformer2DModel.from_pretrained(tmp_path / "out")
    z, t, lr = torch.randn(2, LATENT, 4, 3), torch.rand(2), torch.rand(2, 3, 4, 3)
    text = TextEmbedding(torch.randn(2, 6, 10), torch.ones(2, 6, dtype=torch.bool))
    with torch.no_grad():
        theirs = model(torch.cat([z, network.stem(lr)], dim=1), text.values, 1000 * t, return_dict=False)[0]
        assert error(network(z, t, network.prepare(lr, text)), theirs) <= 1e-5
    assert {name.split(".")[0] for name in rest} == {"stem"}
    assert sorted(load_file(tmp_path / "out" / EXTRA_WEIGHTS)) == rest


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"interpolation_scale": 2}, "interpolation_scale: got 2; expected None"),
        ({"guidance_embeds": True}, "guidance_embeds: got True; expected False"),
        ({"patch_size": 2}, "patch_size: got 2; expected 1"),
        ({"cross_attention_dim": 48}, "cross_attention_dim: got 48; expected 24"),
        ({"qk_norm": "layer_norm"}, "qk_norm: got 'layer_norm'; expected 'rms_norm_across_heads'"),
        ({"rotary": 1}, r"got settings \['rotary'\]"),
        ({"_class_name": "PixArtTransformer2DModel"}, "got 'PixArtTransformer2DModel'"),
    ],
)
def test_models_with_parts_that_ours_has_not_are_refused(tmp_path: Path, setting: dict[str, Any], message: str) -> None:
    sana().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **setting}))
    with pytest.raises(SanaError, match=message):
        read_sana(tmp_path)


def test_missing_and_foreign_weights_are_named(tmp_path: Path) -> None:
    sana().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["extra"] = weights.pop("proj_out.bias")
    save_file(weights, path)
    with pytest.raises(SanaError, match=r"missing: \['proj_out.bias'\]; not known: \['extra'\]"):
        read_sana(tmp_path)
    path.unlink()
    with pytest.raises(SanaError, match="got no weights; expected diffusion_pytorch_model"):
        read_sana(tmp_path)
