"""The Recognize Anything Model and DAPE as taggers: the network, written anew around timm's Swin, for the weights of their authors.

Sources: RAM (arXiv 2306.03514), SeeSR's DAPE (arXiv 2311.16518): the same network with LoRA on queries and values of the image encoder.
Shape suffixes: B batch, N image tokens, K tags, C width.
"""

import importlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS_FILE = "ram_swin_large_14m.pth"
DAPE_FILE = "DAPE.pth"
TAGS_FILE = "ram_tag_list.txt"
THRESHOLDS_FILE = "ram_tag_list_threshold.txt"
SIDE_PX = 384
"""Side of the square that pictures are resized to."""
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class RamShape:
    """Sizes of the network; the defaults are those of the released swin-L."""

    swin_width: int = 192
    """Channels of the first of four stages; each next one has twice as many."""
    depths: tuple[int, ...] = (2, 2, 18, 2)
    heads: tuple[int, ...] = (6, 12, 24, 48)
    window: int = 12
    """Tokens along the side of an attention window."""
    label_width: int = 512
    """Channels of tag embeddings, which are CLIP's, and of projected image tokens."""
    width: int = 768
    """Channels of the tagging head."""
    ffn_width: int = 3072
    head_layers: int = 2
    cross_heads: int = 4


class TaggingLayer(nn.Module):
    """A layer of the tagging head: tags attend to the picture, then a feed-forward network; no self-attention, norms last.

    Source: Query2Label (arXiv 2107.10834), on BERT's layers.
    """

    def __init__(self, shape: RamShape) -> None:
        """Make the layer."""
        super().__init__()
        self.cross_heads = shape.cross_heads
        self.query = nn.Linear(shape.width, shape.width)
        self.key = nn.Linear(shape.label_width, shape.width)
        self.value = nn.Linear(shape.label_width, shape.width)
        self.cross_out = nn.Linear(shape.width, shape.width)
        self.cross_norm = nn.LayerNorm(shape.width, eps=1e-12)
        self.ffn_in = nn.Linear(shape.width, shape.ffn_width)
        self.ffn_out = nn.Linear(shape.ffn_width, shape.width)
        self.ffn_norm = nn.LayerNorm(shape.width, eps=1e-12)

    def forward(self, tags_BKC: Tensor, image_BNL: Tensor) -> Tensor:
        """Return tags (B, K, C) that have looked at the image tokens (B, N, L)."""
        q, k, v = (
            part.unflatten(2, (self.cross_heads, -1)).transpose(1, 2)  # (B, heads, K or N, C / heads)
            for part in (self.query(tags_BKC), self.key(image_BNL), self.value(image_BNL))
        )
        seen_BKC = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tags_BKC = self.cross_norm(tags_BKC + self.cross_out(seen_BKC))
        return self.ffn_norm(tags_BKC + self.ffn_out(F.gelu(self.ffn_in(tags_BKC))))  # type: ignore[no-any-return]


class Ram(nn.Module):
    """Scores every tag of its list in a picture."""

    def __init__(self, shape: RamShape, num_tags: int) -> None:
        """Make the network, untrained.

        Raises:
            ImportError: if timm is not installed.
        """
        super().__init__()
        swin: Any = importlib.import_module("timm.models.swin_transformer")
        self.visual_encoder = swin.SwinTransformer(
            img_size=SIDE_PX,
            embed_dim=shape.swin_width,
            depths=shape.depths,
            num_heads=shape.heads,
            window_size=shape.window,
            num_classes=0,
        )
        self.image_proj = nn.Linear(shape.swin_width * 2 ** (len(shape.depths) - 1), shape.label_width)
        self.label_embed = nn.Parameter(torch.zeros(num_tags, shape.label_width))
        self.wordvec_proj = nn.Linear(shape.label_width, shape.width)
        self.layers = nn.ModuleList(TaggingLayer(shape) for _ in range(shape.head_layers))
        self.fc = nn.Linear(shape.width, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (B, K) of pictures (B, 3, 384, 384), normalised by ImageNet's mean and deviation."""
        grid_BHWC = self.visual_encoder.forward_features(pixels)
        tokens_BNC = grid_BHWC.flatten(1, 2)
        # The mean of all tokens comes first, as a token of its own.
        image_BNL = self.image_proj(torch.cat([tokens_BNC.mean(dim=1, keepdim=True), tokens_BNC], dim=1))
        tags = F.relu(self.wordvec_proj(self.label_embed)).expand(len(pixels), -1, -1)
        for layer in self.layers:
            tags = layer(tags, image_BNL)
        return self.fc(tags)[..., 0]  # type: ignore[no-any-return]


_SWIN = "visual_encoder."
_HEAD = "tagging_head.encoder.layer."
_HEAD_NAMES = {
    "query": "crossattention.self.query",
    "key": "crossattention.self.key",
    "value": "crossattention.self.value",
    "cross_out": "crossattention.output.dense",
    "cross_norm": "crossattention.output.LayerNorm",
    "ffn_in": "intermediate.dense",
    "ffn_out": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
"""Modules of a layer of the tagging head: ours -> theirs."""


def load_ram(folder: Path, *, dape: bool) -> Ram:
    """Return RAM, or with `dape` DAPE, with the weights of its authors from a folder; sizes are read from the weights.

    Raises:
        ImportError: if timm is not installed.
        OSError: if a file is missing or cannot be read.
        ValueError: if a file does not hold the network's weights; the message says which are amiss.
    """
    state = _read(folder / WEIGHTS_FILE)
    if dape:
        state = merge_lora(state, _read(folder / DAPE_FILE))
    try:
        network = Ram(_shape_of(state), len(state["label_embed"]))
        convert: Any = importlib.import_module("timm.models.swin_transformer").checkpoint_filter_fn
        theirs = {name.removeprefix(_SWIN): value for name, value in state.items() if name.startswith(_SWIN)}
        weights = {_SWIN + name: value for name, value in convert(theirs, network.visual_encoder).items()}
        weights |= {name: state[_their_name(name)] for name in network.state_dict() if not name.startswith(_SWIN)}
        network.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{folder / WEIGHTS_FILE}: got weights of another network: {error}; expected those of RAM") from error
    return network.eval()


def merge_lora(state: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with low-rank updates `B A / rank` added: to whole matrices, or to the first and last third of `qkv`.

    Raises:
        ValueError: if there are no updates, or one belongs to no weight.
    """
    merged = dict(state)
    names = [name.removesuffix(".lora_A") for name in lora if name.endswith(".lora_A")]
    absent = [name for name in names if f"{name}.weight" not in merged or f"{name}.lora_B" not in lora]
    if not names or absent:
        raise ValueError(f"{DAPE_FILE}: got updates for {', '.join(absent[:3]) or 'nothing'}; expected some for weights of RAM")
    for name in names:
        down, up, weight = lora[f"{name}.lora_A"], lora[f"{name}.lora_B"], merged[f"{name}.weight"].clone()
        rank = up.shape[1]
        if len(up) == len(weight):
            weight += up @ down / rank
        else:
            third = len(weight) // 3
            weight[:third] += up[:third] @ down[:rank] / rank
            weight[-third:] += up[third:] @ down[rank:] / rank
        merged[f"{name}.weight"] = weight
    return merged


def _read(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: cannot be read as weights: {error}") from error
    state: dict[str, Tensor] = content.get("model", content)
    return state


def _shape_of(state: Mapping[str, Tensor]) -> RamShape:
    stages = range(sum(name.endswith("blocks.0.norm1.weight") for name in state))
    tables = [state[f"{_SWIN}layers.{stage}.blocks.0.attn.relative_position_bias_table"] for stage in stages]
    depths = tuple(sum(name.startswith(f"{_SWIN}layers.{stage}.") and name.endswith("norm1.weight") for name in state) for stage in stages)
    return RamShape(
        swin_width=len(state[f"{_SWIN}patch_embed.proj.weight"]),
        depths=depths,
        heads=tuple(table.shape[1] for table in tables),
        window=(isqrt(len(tables[0])) + 1) // 2,
        label_width=state["label_embed"].shape[1],
        width=state["fc.weight"].shape[1],
        ffn_width=len(state[f"{_HEAD}0.intermediate.dense.weight"]),
        head_layers=sum(name.startswith(_HEAD) and name.endswith("self.query.weight") for name in state),
    )


def _their_name(name: str) -> str:
    """Return the authors' name of a weight outside the image encoder."""
    parts = name.split(".")
    return f"{_HEAD}{parts[1]}.{_HEAD_NAMES[parts[2]]}.{parts[3]}" if parts[0] == "layers" else name
