"""RAM and DAPE: a small network saved under its authors' names is loaded whole, and computes what its parts say.

The released weights are on no package index. That the network is the authors' was checked once against their own code with random weights:
image tokens are equal, logits differ by float32 rounding (6e-6 at 20).
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.swin_transformer import SwinTransformer
from torch import nn
from torch.nn import functional as F

from linearsr import ram
from linearsr.taggers import Photo, TaggerConfig, TaggerError, make_tagger

TAGS = ("Cat", "red car", "sky")
HEAD = "tagging_head.encoder.layer"


class Reference:
    """The same network from parts of others: timm's Swin and torch's multi-head attention."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.swin = SwinTransformer(
            img_size=384, embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), window_size=12, num_classes=0
        ).eval()
        for parameter in self.swin.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.image_proj, self.words, self.fc = nn.Linear(64, 24), nn.Linear(24, 16), nn.Linear(16, 1)
        self.labels = 3 * torch.randn(len(TAGS), 24)
        self.cross = nn.MultiheadAttention(16, 4, kdim=24, vdim=24, batch_first=True)
        self.norms = nn.LayerNorm(16, eps=1e-12), nn.LayerNorm(16, eps=1e-12)
        self.ffn = nn.Linear(16, 20), nn.Linear(20, 16)
        nn.init.normal_(self.fc.weight, std=3)

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        tokens = self.swin.forward_features(pixels).flatten(1, 2)
        image = self.image_proj(torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1))
        tags = self.words(self.labels).relu().expand(len(pixels), -1, -1)
        tags = self.norms[0](tags + self.cross(tags, image, image)[0])
        return self.fc(self.norms[1](tags + self.ffn[1](F.gelu(self.ffn[0](tags))))).squeeze(-1)

    def state(self) -> dict[str, torch.Tensor]:
        """Its weights as the authors name them: downsampling ends a stage, and there are parts that tagging leaves alone."""
        moved = {
            re.sub(r"layers.(\d).down", lambda hit: f"layers.{int(hit[1]) - 1}.down", name): v for name, v in self.swin.state_dict().items()
        }
        state = {f"visual_encoder.{name}": value for name, value in moved.items()} | {"label_embed": self.labels}
        parts = {
            "image_proj": self.image_proj,
            "wordvec_proj": self.words,
            "fc": self.fc,
            f"{HEAD}.0.crossattention.output.dense": self.cross.out_proj,
            f"{HEAD}.0.crossattention.output.LayerNorm": self.norms[0],
            f"{HEAD}.0.intermediate.dense": self.ffn[0],
            f"{HEAD}.0.output.dense": self.ffn[1],
            f"{HEAD}.0.output.LayerNorm": self.norms[1],
        }
        state |= {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
        weights = (self.cross.q_proj_weight, self.cross.k_proj_weight, self.cross.v_proj_weight)
        for name, weight, bias in zip(("query", "key", "value"), weights, self.cross.in_proj_bias.chunk(3), strict=True):
            state |= {f"{HEAD}.0.crossattention.self.{name}.{key}": part.detach() for key, part in (("weight", weight), ("bias", bias))}
        return state | {"tag_encoder.embeddings.word_embeddings.weight": torch.zeros(2, 2)}


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture
def folder(reference: Reference, tmp_path: Path) -> Path:
    torch.save({"model": reference.state()}, tmp_path / ram.WEIGHTS_FILE)
    (tmp_path / ram.TAGS_FILE).write_text("\n".join(TAGS) + "\n")
    (tmp_path / ram.THRESHOLDS_FILE).write_text("0.5\n0.6\n0.7\n")
    return tmp_path


def photo(seed: int) -> Photo:
    return Photo(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)))


@torch.no_grad()
def test_the_network_computes_what_its_parts_do(reference: Reference, folder: Path) -> None:
    pixels = torch.randn(2, 3, 384, 384)
    expected = reference.logits(pixels)
    assert (expected[0] - expected[1]).abs().max() > 0.01
    torch.testing.assert_close(ram.load_ram(folder, dape=False)(pixels), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_every_tag_has_its_own_threshold(reference: Reference, folder: Path) -> None:
    everything = make_tagger("ram", TaggerConfig(weights=str(folder), threshold=0.0)).tag([photo(0)])[0]
    confidences = {tag.name: tag.confidence for tag in everything}
    assert set(confidences) == {"cat", "red car", "sky"}
    square = np.asarray(photo(0).image.resize((384, 384), Image.Resampling.BILINEAR)) / 255
    pixels = torch.from_numpy((square - ram.IMAGE_MEAN) / ram.IMAGE_STD).float().permute(2, 0, 1)[None]
    assert list(confidences.values()) == pytest.approx(sorted(reference.logits(pixels)[0].sigmoid().tolist(), reverse=True), abs=1e-4)
    (folder / ram.THRESHOLDS_FILE).write_text(
        "\n".join(str(confidences[name.lower()] + (-0.01 if name == "sky" else 0.01)) for name in TAGS)
    )
    assert [tag.name for tag in make_tagger("ram", TaggerConfig(weights=str(folder))).tag([photo(0)])[0]] == ["sky"]


def test_dape_adds_low_rank_updates(reference: Reference, folder: Path) -> None:
    name, head = "visual_encoder.layers.0.blocks.0.attn.qkv", f"{HEAD}.0.crossattention.self.query"
    down, up = torch.randn(2 * 3, 8), torch.randn(2 * 8, 3)
    lora = {f"{name}.lora_A": down, f"{name}.lora_B": up, f"{head}.lora_A": torch.randn(3, 16), f"{head}.lora_B": torch.randn(16, 3)}
    state = reference.state()
    merged = ram.merge_lora(state, lora)
    # Queries and values, not keys; as a grouped convolution, which is how the authors' library has it.
    update = F.conv1d(down[None], up[..., None], groups=2)[0] / 3
    expected = state[f"{name}.weight"] + torch.cat([update[:8], torch.zeros(8, 8), update[8:]])
    torch.testing.assert_close(merged[f"{name}.weight"], expected)
    torch.testing.assert_close(merged[f"{head}.weight"], state[f"{head}.weight"] + lora[f"{head}.lora_B"] @ lora[f"{head}.lora_A"] / 3)
    torch.save(lora, folder / ram.DAPE_FILE)
    plain, tuned = (make_tagger(kind, TaggerConfig(weights=str(folder), threshold=0.0)).tag([photo(0)])[0] for kind in ("ram", "dape"))
    assert {tag.name: tag.confidence for tag in plain} != pytest.approx({tag.name: tag.confidence for tag in tuned}, abs=1e-4)


def test_files_that_do_not_fit_are_named(reference: Reference, folder: Path) -> None:
    with pytest.raises(TaggerError, match=r"DAPE.pth"):
        make_tagger("dape", TaggerConfig(weights=str(folder)))
    with pytest.raises(ValueError, match=r"DAPE.pth: got updates for nothing"):
        ram.merge_lora(reference.state(), {})
    (folder / ram.THRESHOLDS_FILE).write_text("0.5\n")
    with pytest.raises(TaggerError, match=r"expected equally many"):
        make_tagger("ram", TaggerConfig(weights=str(folder)))
    torch.save({"model": {"fc.weight": torch.zeros(1, 16)}}, folder / ram.WEIGHTS_FILE)
    with pytest.raises(TaggerError, match=r"got weights of another network"):
        make_tagger("ram", TaggerConfig(weights=str(folder)))
    (folder / ram.WEIGHTS_FILE).write_text("no weights")
    with pytest.raises(TaggerError, match=r"cannot be read as weights"):
        make_tagger("ram", TaggerConfig(weights=str(folder)))
