"""The network: attention against its explicit form, published sizes, the codec's inverse, the prior's limits."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from linearsr.attention import LinearAttention, relu_linear_attention
from linearsr.backbone import Backbone
from linearsr.blocks import Block
from linearsr.codec import make_codec
from linearsr.conditioning import TextEmbedding
from linearsr.config import BACKBONES, BackboneConfig, CodecConfig, LatentStatistics, ModelConfig, TagsConfig
from linearsr.depthwise import gated_depthwise
from linearsr.fused import modulated_norm, relu_attention
from linearsr.linear import Linear
from linearsr.model import SuperResolver
from linearsr.statistics import measure_statistics

CODECS = [CodecConfig(kind=kind, factor=factor) for kind in ("haar", "space_to_depth") for factor in (1, 4, 8)]


def model(prior: str = "lr", factor: int = 4) -> SuperResolver:
    config = ModelConfig(
        codec=CodecConfig(factor=factor),
        backbone=BackboneConfig(width=32, num_blocks=2, caption_width=16),
        tags=TagsConfig(vocabulary=("cat", "sky")),
        prior=prior,  # type: ignore[arg-type]
    )
    channels = config.codec.latent_channels
    statistics = LatentStatistics(mean=(0.1,) * channels, std=(0.5,) * channels, residual_std=(0.3,) * channels)
    return SuperResolver(config, statistics)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.relu(q) @ torch.relu(k).transpose(-1, -2)
    return (scores / (scores.sum(-1, keepdim=True) + 1e-15)) @ v


def test_linear_attention_equals_the_quadratic_form_with_gradients() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    torch.testing.assert_close(relu_linear_attention(q, k, v), explicit_attention(q, k, v))
    assert torch.autograd.gradcheck(lambda *x: relu_linear_attention(*x, eps=1e-3), (q, k, v))


def test_linear_attention_sums_in_float32() -> None:
    # 4096 equal keys: a bfloat16 sum stalls at 256, and the mean of the values would come out 16 times too large.
    ones = torch.ones(1, 1, 4096, 1, dtype=torch.bfloat16)
    assert relu_linear_attention(ones, ones, ones).float().max() == 1


def test_a_query_without_a_positive_key_gives_zero() -> None:
    q = -torch.ones(1, 1, 3, 2)
    assert (relu_linear_attention(q, torch.ones_like(q), torch.ones_like(q)) == 0).all()


def test_attention_names_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match="expected three equal shapes"):
        relu_linear_attention(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))


@pytest.mark.parametrize(("name", "millions"), [("sana-600m", 591.75), ("sana-1600m", 1604.46)])
def test_published_sizes_have_the_published_number_of_parameters(name: str, millions: float) -> None:
    shape = BACKBONES[name]
    with torch.device("meta"):
        backbone = Backbone(shape, latent_channels=32, lr_pixels_per_token=8, num_tags=0)
    ours = sum(p.numel() for p in backbone.stem.parameters()) + backbone.tags.table.weight.numel() + shape.width * shape.stem_width
    total = sum(p.numel() for p in backbone.parameters())
    assert round((total - ours) / 1e6, 2) == millions
    assert sum(p.numel() for p in backbone.stem.parameters()) == 112_544


@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_small_presets_build_and_run(name: str) -> None:
    backbone = Backbone(BACKBONES[name], latent_channels=48, lr_pixels_per_token=1, num_tags=3)
    out = backbone(torch.randn(1, 48, 4, 6), torch.rand(1), backbone.prepare(torch.rand(1, 3, 4, 6), torch.zeros(1, 2, dtype=torch.long)))
    assert out.shape == (1, 48, 4, 6)


@pytest.mark.parametrize("config", CODECS, ids=lambda c: f"{c.kind}-{c.factor}")
def test_codecs_invert_exactly_and_keep_the_norm(config: CodecConfig) -> None:
    codec, x = make_codec(config), torch.randn(2, 3, 16, 24)
    latent = codec.encode(x)
    assert latent.shape == (2, config.latent_channels, 16 // config.factor, 24 // config.factor)
    torch.testing.assert_close(codec.decode(latent), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(latent.norm(), x.norm())


def test_measured_statistics_give_unit_variance_latents() -> None:
    config = ModelConfig(codec=CodecConfig(factor=4), prior="lr")
    hr = torch.rand(16, 3, 32, 32).mul(2).sub(1)
    lr = torch.nn.functional.avg_pool2d(hr, 4)
    network = SuperResolver(config, measure_statistics(config, hr, lr))
    latent = network.space.encode(hr)
    torch.testing.assert_close(latent.mean(dim=(0, 2, 3)), torch.zeros(48), atol=1e-4, rtol=0)
    torch.testing.assert_close(latent.std(dim=(0, 2, 3)), torch.ones(48), atol=1e-3, rtol=0)
    residual = (latent - network.space.prior_mean(lr)).square().mean(dim=(0, 2, 3)).sqrt()
    torch.testing.assert_close(residual, network.space.sigma.value.flatten(), atol=1e-3, rtol=0)


def test_an_untrained_network_with_the_lr_prior_is_bicubic_at_pure_noise() -> None:
    network, lr = model(), torch.rand(1, 3, 8, 12) * 1.6 - 0.8
    condition = network.condition(lr, torch.zeros(1, 4, dtype=torch.long))
    restored = network.space.decode(network.denoise(torch.randn(1, 48, 8, 12), 1.0, condition))
    bicubic = torch.nn.functional.interpolate(lr, scale_factor=4, mode="bicubic", antialias=True)
    torch.testing.assert_close(restored, bicubic.clamp(-1, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prior", ["none", "lr"])
def test_the_estimate_is_the_latent_itself_where_there_is_no_noise(prior: str) -> None:
    network, z = model(prior), torch.randn(2, 48, 4, 4)
    torch.nn.init.normal_(network.network.head.weight)
    condition = network.condition(torch.rand(2, 3, 4, 4), torch.zeros(2, 4, dtype=torch.long))
    torch.testing.assert_close(network.denoise(z, 1e-6, condition), z, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9, 1.0])
def test_the_lr_prior_gives_unit_errors_before_training(t: float) -> None:
    network = model()
    mean = network.space.prior_mean(torch.zeros(64, 3, 8, 8))
    clean = mean + 0.3 * torch.randn(64, 48, 8, 8)
    level = torch.full((64,), t)
    z = (1 - t) * clean + t * torch.randn_like(clean)
    with torch.no_grad():
        estimate = network(z, level, torch.zeros(64, 3, 8, 8), torch.zeros(64, 4, dtype=torch.long))
    error = (estimate - clean) / network.space.error_scale(level[:, None, None, None])
    assert math.isclose(error.square().mean().item(), 1, rel_tol=0.02)


def test_tags_change_the_estimate_and_padding_does_not() -> None:
    network = model()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    z, lr = torch.randn(1, 48, 4, 4), torch.rand(1, 3, 4, 4)

    def estimate(ids: list[int]) -> Tensor:
        return network.denoise(z, 0.5, network.condition(lr, torch.tensor([ids])))

    assert not torch.allclose(estimate([1, 0]), estimate([2, 0]))
    assert not torch.allclose(estimate([1, 0]), estimate([0, 0]))
    torch.testing.assert_close(estimate([1, 0]), estimate([1, 0, 0, 0]))


def test_statistics_of_another_codec_are_refused() -> None:
    statistics = LatentStatistics(mean=(0.0,), std=(1.0,), residual_std=(1.0,))
    with pytest.raises(ValueError, match="got 1 channels; expected 48"):
        SuperResolver(ModelConfig(), statistics)


def test_modulated_norm_has_the_gradients_of_its_definition() -> None:
    torch.manual_seed(0)
    for batch in (1, 3):
        inputs = [torch.randn(batch, count, 5, dtype=torch.float64, requires_grad=True) for count in (4, 1, 1)]
        expected = torch.nn.functional.layer_norm(inputs[0], (5,), eps=1e-6) * (1 + inputs[2]) + inputs[1]
        torch.testing.assert_close(modulated_norm(*inputs), expected)
        assert torch.autograd.gradcheck(modulated_norm, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_over_many_tokens_do_not_stop_short_in_halves(dtype: torch.dtype) -> None:
    """Of a sum over results every shift has the gradient N, and with features that are +1 or -1 a scale has that times the feature."""
    x = torch.where(torch.arange(16) % 2 == 0, 1.0, -1.0).expand(1, 4096, 16).to(dtype)
    shift, scale = (torch.zeros(1, 1, 16, dtype=dtype, requires_grad=True) for _ in range(2))
    modulated_norm(x, shift, scale).sum().backward()
    assert torch.equal(shift.grad, torch.full_like(shift, 4096))
    torch.testing.assert_close(scale.grad, 4096 * x[:, :1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_is_welcome_on_a_cpu(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearsr.linear.MIN_PRODUCTS", 0)
    block = Backbone(BackboneConfig(width=32, num_blocks=1, caption_width=8), latent_channels=4, lr_pixels_per_token=1).blocks[0]
    x, tokens, modulation = torch.randn(1, 64, 32), torch.randn(1, 3, 32), torch.randn(1, 6, 32)
    with torch.set_grad_enabled(grad):
        caption = block.cross.project(tokens, None)
        exact = block(x, caption, modulation, (8, 8))
        with torch.autocast("cpu"):
            rounded = block(x, block.cross.project(tokens, None), modulation, (8, 8))
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)


def test_gated_depthwise_has_the_gradients_of_its_definition_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("linearsr.bands.CACHED_VALUES", 1)
    monkeypatch.setattr("linearsr.depthwise.MIN_CHANNELS", 16)  # slices of 16 and 3 channels
    hidden, weight, bias = torch.randn(2, 6, 38), torch.randn(38, 1, 3, 3), torch.randn(38)
    inputs = [part.double().requires_grad_() for part in (hidden, weight, bias)]
    planes = torch.nn.functional.silu(inputs[0]).unflatten(1, (2, 3)).permute(0, 3, 1, 2)
    value, gate = torch.nn.functional.conv2d(planes, *inputs[1:], padding=1, groups=38).permute(0, 2, 3, 1).flatten(1, 2).chunk(2, dim=-1)
    torch.testing.assert_close(gated_depthwise(*inputs, (2, 3)), value * torch.nn.functional.silu(gate))
    assert torch.autograd.gradcheck(lambda *x: gated_depthwise(*x, (2, 3)), inputs, fast_mode=True)


@pytest.mark.parametrize(("values", "rows"), [(1, 1), (1, 2), (900, 1), (1 << 20, 4)])
def test_results_do_not_depend_on_the_bands_that_a_cpu_works_on(monkeypatch: pytest.MonkeyPatch, values: int, rows: int) -> None:
    torch.manual_seed(0)
    qkv, hidden, weight, bias = torch.randn(2, 30, 24), torch.randn(2, 30, 38), torch.randn(38, 1, 3, 3), torch.randn(38)
    inputs = [part.double().requires_grad_() for part in (qkv, hidden, weight, bias)]

    def results() -> list[Tensor]:
        mixed, normaliser = relu_attention(inputs[0], 4, 1e-15)
        gated = gated_depthwise(*inputs[1:], (5, 6))
        return [mixed, normaliser, gated, *torch.autograd.grad(mixed.square().sum() + gated.square().sum(), inputs)]

    whole = results()
    monkeypatch.setattr("linearsr.bands.CACHED_VALUES", values)
    monkeypatch.setattr("linearsr.depthwise.MIN_CHANNELS", 7)
    monkeypatch.setattr("linearsr.depthwise.MIN_ROWS", rows)
    torch.testing.assert_close(results(), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("values", "tokens"), [(1, 1), (1, 14), (500, 1), (1 << 20, 256)])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_block_without_a_gradient_gives_what_it_gives_with_one(
    monkeypatch: pytest.MonkeyPatch, batch: int, values: int, tokens: int
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("linearsr.bands.CACHED_VALUES", values)
    monkeypatch.setattr("linearsr.bands.MIN_TOKENS", tokens)
    block = Block(BackboneConfig(width=32, num_blocks=1, num_cross_heads=2)).double()
    seen: list[tuple[Tensor, Tensor]] = []
    block.attention.probe = lambda *shown: seen.append(shown)
    for grid in ((6, 7), (1, 9), (9, 1), (40, 1)):  # 9 tokens are too few for the width to fold projections
        x, caption, modulation = (torch.randn(batch, count, 32, dtype=torch.float64) for count in (grid[0] * grid[1], 5, 6))
        x[0, 0] = 0

        def run() -> Tensor:
            return block(x, block.cross.project(caption, None), modulation, grid)  # noqa: B023 (called in this turn)

        expected = run().detach()
        with torch.no_grad():
            torch.testing.assert_close(run(), expected)
        (_, with_gradient), (_, without) = seen[-2:]
        torch.testing.assert_close(without, with_gradient)


@pytest.mark.parametrize("dead", ["query", "key"])
def test_attention_without_a_gradient_gives_zero_where_queries_or_keys_are_dead(dead: str) -> None:
    torch.manual_seed(0)
    attention, x = LinearAttention(8, 4), torch.rand(2, 9, 8)
    with torch.no_grad():
        attention.qkv.weight.view(3, 8, 8)[("query", "key").index(dead)] = -1
        assert torch.equal(attention(x), attention.out.bias.expand(2, 9, 8))


def test_halves_are_multiplied_in_float32_where_the_processor_has_no_instructions_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("linearsr.linear._has_instructions", lambda half: False)
    layer, x = Linear(6, 5).bfloat16(), torch.randn(2, 3, 6).bfloat16().requires_grad_()
    exact, x32 = torch.nn.Linear(6, 5), x.detach().float().requires_grad_()
    exact.load_state_dict(layer.state_dict())
    results = []
    for one, argument in ((layer, x), (exact, x32)):
        out = one(argument)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [argument, *one.parameters()])])
    # The loss is of the rounded output on one side, so gradients differ by its rounding, and not by that of partial sums.
    assert torch.equal(results[0][0], results[1][0].bfloat16())
    torch.testing.assert_close(results[0][1:], [part.bfloat16() for part in results[1][1:]], rtol=2e-2, atol=2e-2)
    hidden, weight, bias = (part.bfloat16() for part in (torch.randn(2, 6, 38), torch.randn(38, 1, 3, 3), torch.randn(38)))
    wide = gated_depthwise(hidden.float(), weight.float(), bias.float(), (2, 3))
    assert torch.equal(gated_depthwise(hidden, weight, bias, (2, 3)), wide.bfloat16())
    block, x, caption = (
        Block(BackboneConfig(width=32, num_blocks=1, num_cross_heads=2)).bfloat16(),
        torch.randn(1, 42, 32),
        torch.randn(1, 5, 32),
    )
    arguments = (block.cross.project(caption.bfloat16(), None), torch.randn(1, 6, 32).bfloat16(), (6, 7))
    with_gradient = block(x.bfloat16(), *arguments).detach()
    with torch.no_grad():
        torch.testing.assert_close(block(x.bfloat16(), *arguments), with_gradient, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_network_compiles_without_a_break_and_to_the_same_numbers(dtype: torch.dtype, apart: float) -> None:
    torch.manual_seed(0)
    network = Backbone(BackboneConfig(width=64, num_blocks=1, num_cross_heads=2), latent_channels=4, lr_pixels_per_token=1).to(dtype)
    torch.nn.init.normal_(network.head.weight)
    z, t, lr = torch.randn(2, 4, 6, 8), torch.tensor([0.3, 0.6]), torch.rand(2, 3, 6, 8).to(dtype)

    def results(run: Callable[..., Tensor]) -> list[Tensor]:
        out = run(z, t, network.prepare(lr, torch.zeros(2, 4, dtype=torch.long)))
        grads = torch.autograd.grad(out.square().sum(), list(network.blocks.parameters()))
        return [out, torch.cat([grad.flatten() for grad in grads])]

    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    for ours, plain in zip(results(network), results(compiled), strict=True):
        assert (ours - plain).float().norm() <= apart * plain.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_stays_finite_when_queries_die_and_keys_vanish(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 9, 24)
    qkv[0, :, :8] = -1  # no query lives
    qkv[1, :, 8:16] = -1  # no key does
    qkv = qkv.to(dtype).requires_grad_()
    mixed, normaliser = relu_attention(qkv, 4, 1e-15)
    mixed.float().square().sum().backward()
    assert (mixed == 0).all()
    assert (normaliser == 0).all()
    assert qkv.grad is not None
    assert torch.isfinite(qkv.grad).all()


def test_qk_norm_makes_attention_blind_to_the_scale_of_its_input() -> None:
    attention, x = LinearAttention(8, 4, qk_norm=True), torch.randn(2, 5, 8)
    torch.testing.assert_close(attention(1000 * x) - attention.out.bias, 1000 * (attention(x) - attention.out.bias), rtol=1e-4, atol=1e-2)


def test_a_linear_layer_is_the_same_in_either_library(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # Of so many rows for the channels, a weight's gradient is multiplied the other way round.
    for bias, rows, inputs in ((True, 3, 6), (False, 3, 6), (True, 30, 2)):
        layer, x = Linear(inputs, 5, bias=bias), torch.randn(2, rows, inputs, requires_grad=True)
        results = []
        for threshold in (0, 1 << 40):
            monkeypatch.setattr("linearsr.linear.MIN_PRODUCTS", threshold)
            out = layer(x)
            results.append((out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_caption_without_a_word_is_read_as_zeros_and_padding_is_left_out(qk_norm: bool) -> None:
    torch.manual_seed(0)
    shape = BackboneConfig(width=32, num_blocks=1, caption_width=6, num_cross_heads=2, qk_norm=qk_norm)
    network = Backbone(shape, latent_channels=4, lr_pixels_per_token=1, caption_encoder="text")
    torch.nn.init.normal_(network.head.weight)
    lr, values = torch.rand(2, 3, 3, 2), torch.randn(2, 5, 6, requires_grad=True)
    mask = torch.tensor([[False] * 5, [False, True, True, False, False]])
    conditioning = network.prepare(lr, TextEmbedding(values, mask))
    assert conditioning.captions[0].key.shape[2] == 3  # the two real tokens, and the first, which an empty caption keeps
    out = network(torch.randn(2, 4, 3, 2), torch.rand(2), conditioning)
    out.square().sum().backward()
    assert torch.isfinite(out).all()
    assert values.grad is not None
    assert (values.grad[0] == 0).all()
    assert (values.grad[1].abs().sum(dim=1) > 0).tolist() == mask[1].tolist()
    assert network.prepare(lr, TextEmbedding(values, mask[:1].expand(2, -1))).captions[0].key.shape[2] == 1


def test_the_other_kind_of_caption_is_refused() -> None:
    shape, ids = BackboneConfig(width=32, num_blocks=1, caption_width=6), torch.zeros(1, 2, dtype=torch.long)
    text = TextEmbedding(torch.zeros(1, 2, 6), torch.ones(1, 2, dtype=torch.bool))
    for encoder, captions in (("text", ids), ("learned", text)):
        network = Backbone(shape, latent_channels=4, lr_pixels_per_token=1, caption_encoder=encoder)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"fix: set `tags\.encoder`"):
            network.prepare(torch.rand(1, 3, 2, 2), captions)
