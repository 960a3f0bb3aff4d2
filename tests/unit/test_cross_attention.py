"""Cross-attention: the two ways to read a caption are one function, and the rule between them counts products."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from linearsr.attention import AbsorbedCaption, CrossAttention, KeyValue, absorption_pays
from linearsr.backbone import Backbone
from linearsr.conditioning import TextEmbedding
from linearsr.config import BACKBONES, BackboneConfig
from linearsr.linear import linear_each

WIDTH, HEADS, TOKENS, CAPTION = 24, 3, 20, 4
MASKS = {
    "all real": None,
    "padding": torch.tensor([[True, True, True, False], [False, True, False, True]]),
    "no word": torch.tensor([[False] * 4, [True] * 4]),
}


def explicit(cross: CrossAttention, x: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Return softmax attention head by head; a caption without a word gives the bias of the output alone."""
    key, value = cross.key_value(tokens).chunk(2, dim=-1)
    mixed = []
    for heads in zip(*(part.chunk(HEADS, dim=-1) for part in (cross.query(x), key, value)), strict=True):
        query, key_h, value_h = heads
        scores = query @ key_h.transpose(1, 2) / (WIDTH // HEADS) ** 0.5
        shares = (scores if mask is None else scores.masked_fill(~mask[:, None], float("-inf"))).softmax(dim=-1).nan_to_num(0)
        mixed.append(shares @ value_h)
    return F.linear(torch.cat(mixed, dim=-1), cross.out.weight, cross.out.bias)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ways_equal_softmax_attention_with_gradients(
    monkeypatch: pytest.MonkeyPatch, mask: Tensor | None, absorbed: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("linearsr.linear.MIN_PRODUCTS", 0)
    cross = CrossAttention(WIDTH, HEADS).to(dtype)
    x, tokens = (torch.randn(2, count, WIDTH, dtype=dtype, requires_grad=True) for count in (TOKENS, CAPTION))
    calls: list[str] = []
    for name, part in cross.named_children():
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
    monkeypatch.setattr("linearsr.attention.absorption_pays", lambda *_: absorbed)

    def read() -> Tensor:
        return cross(x, cross.project(tokens, mask))

    results = []
    for way in (read, lambda: explicit(cross, x, tokens, mask)):
        out = way()
        used = [x, tokens, *cross.parameters()]
        results.append((out, *torch.autograd.grad(out.sin().sum(), used)))
    torch.testing.assert_close(*results)
    # Workers that shard weights gather them in the order of the calls, so it may not depend on a worker's captions.
    assert calls[:5] == ["key_value", "norm_k", "query", "norm_q", "out"]


def test_a_caption_absorbed_once_is_read_the_same_at_every_step() -> None:
    torch.manual_seed(0)
    shape = BackboneConfig(width=32, num_blocks=2, caption_width=6, num_cross_heads=2)
    network = Backbone(shape, latent_channels=4, lr_pixels_per_token=1, caption_encoder="text")
    torch.nn.init.normal_(network.head.weight)
    lr, text = torch.rand(2, 3, 8, 6), TextEmbedding(torch.randn(2, 5, 6), torch.tensor([[True] * 3 + [False] * 2, [True] * 5]))
    prepared = [network.prepare(lr, text, reused=reused) for reused in (False, True)]
    assert [type(one.captions[0]) for one in prepared] == [KeyValue, AbsorbedCaption]
    for t in (0.9, 0.4):
        out = [network(torch.full((2, 4, 8, 6), t), torch.full((2,), t), one) for one in prepared]
        torch.testing.assert_close(*out)


@pytest.mark.parametrize(("name", "longest"), [("tiny", 71), ("sana-600m", 71), ("sana-1600m", 105)])
def test_tags_are_absorbed_and_sanas_long_captions_are_not(name: str, longest: int) -> None:
    shape = BACKBONES[name]
    paying = [length for length in range(1, 301) if absorption_pays(1024, length, shape.width, shape.num_cross_heads)]
    assert paying == list(range(1, longest + 1))


def test_nothing_is_absorbed_for_a_few_image_tokens_in_halves_or_under_qk_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    def absorbs(num_tokens: int, dtype: torch.dtype = torch.float32, *, qk_norm: bool = False) -> bool:
        cross = CrossAttention(WIDTH, HEADS, qk_norm=qk_norm).to(dtype)
        return cross.absorbs(cross.project(torch.randn(1, CAPTION, WIDTH, dtype=dtype), None), num_tokens)

    assert absorbs(TOKENS)
    assert not absorbs(CAPTION)
    assert not absorbs(TOKENS, qk_norm=True)
    for has_instructions in (True, False):  # without them halves are multiplied in float32, which rounds no score
        monkeypatch.setattr("linearsr.linear._has_instructions", lambda _, has=has_instructions: has)
        assert absorbs(TOKENS, torch.bfloat16) is not has_instructions


def test_a_projection_of_each_sample_is_the_same_in_either_library(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # The bias is a column of a matrix, as that of an absorbed caption is.
    used = [torch.randn(*shape, requires_grad=True) for shape in ((2, 3, 6), (2, 5, 6), (2, 5, 7))]
    x, weight, bias = used[0], used[1], used[2][..., 3]
    monkeypatch.setattr("linearsr.linear.MIN_PRODUCTS", 0)
    results = []
    for taken in (False, True):
        monkeypatch.setattr("linearsr.linear._takes", lambda *_, taken=taken: taken)
        out = linear_each(x, weight, bias)
        results.append((out, *torch.autograd.grad(out.square().sum(), used)))
    torch.testing.assert_close(*results)
