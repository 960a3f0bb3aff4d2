"""SANA's weights and ours: the same network under two sets of names, in both directions and bit for bit.

A diffusers folder holds `config.json` and safetensors, in one file or in parts with an index. Ours holds `network.json` and
`network.safetensors`, in the names of `linearsr.model.SuperResolver`, so that training can start from it. Nothing here imports diffusers.
Source: method.md 2.1, 2.2, 2.8; the names are those of diffusers 0.42.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from linearsr.conditioning import LowResolutionStem
from linearsr.config import BackboneConfig

FORMAT = "linearsr-network/1"
NETWORK_JSON, NETWORK_WEIGHTS = "network.json", "network.safetensors"
DIFFUSERS_JSON, DIFFUSERS_WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
EXTRA_WEIGHTS = "linearsr.safetensors"
"""Beside an export: what diffusers' model has no place for, the LR stem and the table of learned tags."""
PREFIX = "network."
"""Of the network inside a `SuperResolver`."""
QK_NORM = "rms_norm_across_heads"

_FIXED: dict[str, object] = {
    "attention_bias": False,
    "guidance_embeds": False,
    "interpolation_scale": None,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "patch_size": 1,
    "timestep_scale": 1.0,
}
"""Settings of diffusers' model for which our network knows one value."""
_WITHOUT_EFFECT: dict[str, object] = {"dropout": 0.0, "guidance_embeds_scale": 0.1, "sample_size": 32}
"""Settings that do not change the output of a model with the fixed ones."""
_SHAPE: dict[str, object] = {
    "in_channels": 32, "out_channels": 32, "num_attention_heads": 70, "attention_head_dim": 32, "num_layers": 20,
    "num_cross_attention_heads": 20, "cross_attention_head_dim": 112, "cross_attention_dim": 2240, "caption_channels": 2304,
    "mlp_ratio": 2.5, "qk_norm": None,
}  # fmt: skip
"""Settings that become a `BackboneConfig`, with diffusers' defaults."""


class SanaError(ValueError):
    """A model cannot be converted; the message says which file or setting, and what to do."""


@dataclass(frozen=True)
class SanaModel:
    """A network in our names, as `Backbone(..., caption_encoder="text")` takes it but for the stem."""

    shape: BackboneConfig
    latent_channels: int
    weights: dict[str, Tensor]
    origin: dict[str, Any]
    """The diffusers config as it was read."""


@dataclass(frozen=True)
class _Entry:
    ours: str
    theirs: tuple[str, ...]
    """Joined along their first axis, in this order."""
    pointwise: bool = False
    """Theirs is a 1x1 convolution, ours a linear layer."""


def read_sana(folder: Path, *, stem_width: int = 32) -> SanaModel:
    """Read a diffusers SANA transformer, or the pipeline around it, into our names.

    Args:
        folder: With `config.json`, or with a folder `transformer` that has it.
        stem_width: Channels of the LR stem that the patch embedding is widened for; its new columns are zero, so that the output
            is that of the pretrained network whatever the stem says.

    Raises:
        SanaError: if files are missing, or the model has parts that our network has not.
    """
    if not (folder / DIFFUSERS_JSON).is_file() and (folder / "transformer").is_dir():
        folder = folder / "transformer"
    origin = _read_json(folder / DIFFUSERS_JSON)
    shape, latent_channels = _shape_of(origin, folder / DIFFUSERS_JSON, stem_width)
    return SanaModel(shape, latent_channels, from_diffusers(_read_weights(folder), shape), origin)


def from_diffusers(weights: Mapping[str, Tensor], shape: BackboneConfig) -> dict[str, Tensor]:
    """Return diffusers' weights in our names, without a stem; the patch embedding gets zero columns for it.

    Raises:
        SanaError: if weights are missing, or there are some that our network has no place for.
    """
    entries = _entries(shape)
    expected = {name for entry in entries for name in entry.theirs}
    if expected != set(weights):
        missing, foreign = sorted(expected - set(weights)), sorted(set(weights) - expected)
        raise SanaError(f"weights: got {len(weights)}; expected {len(expected)}; missing: {missing[:3]}; not known: {foreign[:3]}")
    ours = {}
    for entry in entries:
        parts = [weights[name] for name in entry.theirs]
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        ours[entry.ours] = joined.flatten(1) if entry.pointwise else joined
    patch = ours["embed.weight"]
    ours["embed.weight"] = torch.cat([patch, patch.new_zeros(patch.shape[0], shape.stem_width)], dim=1)
    return ours


def to_diffusers(weights: Mapping[str, Tensor], shape: BackboneConfig, latent_channels: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return our weights in diffusers' names, and those that it has no place for in ours.

    Where the patch embedding's columns for the LR stem are all zero they are left out, which gives back the network that was imported.
    A trained one keeps them: its export takes the latent and the stem's output side by side, `in_channels` = both together.

    Raises:
        SanaError: if weights of the network are missing.
    """
    theirs: dict[str, Tensor] = {}
    rest = dict(weights)
    for entry in _entries(shape):
        if entry.ours not in rest:
            raise SanaError(f"weights: got no {entry.ours}; expected those of a network like {shape}; fix: export with its own config")
        value = rest.pop(entry.ours)
        if entry.ours == "embed.weight" and not value[:, latent_channels:].any():
            value = value[:, :latent_channels]
        value = value[..., None, None] if entry.pointwise else value
        theirs.update({name: part.contiguous() for name, part in zip(entry.theirs, value.chunk(len(entry.theirs)), strict=True)})
    return theirs, rest


def import_sana(source: Path, target: Path, *, stem_width: int = 32, lr_pixels_per_token: int = 8, seed: int = 0) -> SanaModel:
    """Convert a diffusers SANA folder into `target`, whole or not at all; see `read_sana`.

    Args:
        source: Diffusers' folder.
        target: A new folder.
        stem_width, lr_pixels_per_token: Of the LR stem; see `Backbone`.
        seed: Of the stem's weights. They are random: were they zero like the columns that read them, neither would ever get a gradient.
    """
    model = read_sana(source, stem_width=stem_width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stem = LowResolutionStem(lr_pixels_per_token, stem_width)
    dtype = model.weights["embed.weight"].dtype
    weights = {**model.weights, **{f"stem.{name}": value.to(dtype) for name, value in stem.state_dict().items()}}
    document = {
        "format": FORMAT,
        "backbone": asdict(model.shape),
        "latent_channels": model.latent_channels,
        "lr_pixels_per_token": lr_pixels_per_token,
        "caption_encoder": "text",
        "diffusers": model.origin,
    }
    with _new_folder(target) as folder:
        save_file({PREFIX + name: value for name, value in weights.items()}, folder / NETWORK_WEIGHTS, metadata={"format": "pt"})
        _write_json(folder / NETWORK_JSON, document)
    return SanaModel(model.shape, model.latent_channels, weights, model.origin)


def read_network(folder: Path) -> SanaModel:
    """Read what `import_sana` wrote.

    Raises:
        SanaError: if it is not such a folder.
    """
    document = _read_json(folder / NETWORK_JSON)
    if document.get("format") != FORMAT:
        raise SanaError(f"{folder / NETWORK_JSON}: format: got {document.get('format')!r}; expected {FORMAT!r}; fix: import it again")
    weights = read_expert(folder / NETWORK_WEIGHTS)
    return SanaModel(BackboneConfig(**document["backbone"]), document["latent_channels"], weights, document["diffusers"])


def read_expert(path: Path) -> dict[str, Tensor]:
    """Return the network inside a safetensors file of a `SuperResolver`, in the names of a `Backbone`."""
    return {name.removeprefix(PREFIX): value for name, value in _load(path).items() if name.startswith(PREFIX)}


def export_diffusers(model: SanaModel, target: Path) -> list[str]:
    """Write a folder that diffusers' `SanaTransformer2DModel.from_pretrained` loads, whole or not at all.

    Returns:
        The names of weights that diffusers has no place for; they are in `linearsr.safetensors` beside the model.
    """
    theirs, rest = to_diffusers(model.weights, model.shape, model.latent_channels)
    in_channels = theirs["patch_embed.proj.weight"].shape[1]
    with _new_folder(target) as folder:
        save_file(theirs, folder / DIFFUSERS_WEIGHTS, metadata={"format": "pt"})
        if rest:
            save_file({name: value.contiguous() for name, value in rest.items()}, folder / EXTRA_WEIGHTS, metadata={"format": "pt"})
        _write_json(folder / DIFFUSERS_JSON, _diffusers_config(model, in_channels))
    return sorted(rest)


def _entries(shape: BackboneConfig) -> list[_Entry]:
    def both(ours: str, theirs: str, *, pointwise: bool = False) -> list[_Entry]:
        return [_Entry(f"{ours}.weight", (f"{theirs}.weight",), pointwise), _Entry(f"{ours}.bias", (f"{theirs}.bias",))]

    entries = [
        *both("embed", "patch_embed.proj", pointwise=True),
        *both("time.mlp.0", "time_embed.emb.timestep_embedder.linear_1"),
        *both("time.mlp.2", "time_embed.emb.timestep_embedder.linear_2"),
        *both("modulation.1", "time_embed.linear"),
        *both("tags.projection.0", "caption_projection.linear_1"),
        *both("tags.projection.2", "caption_projection.linear_2"),
        _Entry("tags.norm.weight", ("caption_norm.weight",)),
        _Entry("table", ("scale_shift_table",)),
        *both("head", "proj_out"),
    ]
    for index in range(shape.num_blocks):
        ours, theirs = f"blocks.{index}", f"transformer_blocks.{index}"
        key_value = [f"{theirs}.attn2.to_{part}" for part in "kv"]
        entries += [
            _Entry(f"{ours}.table", (f"{theirs}.scale_shift_table",)),
            _Entry(f"{ours}.attention.qkv.weight", tuple(f"{theirs}.attn1.to_{part}.weight" for part in "qkv")),
            *both(f"{ours}.attention.out", f"{theirs}.attn1.to_out.0"),
            *both(f"{ours}.cross.query", f"{theirs}.attn2.to_q"),
            *(_Entry(f"{ours}.cross.key_value.{kind}", tuple(f"{name}.{kind}" for name in key_value)) for kind in ("weight", "bias")),
            *both(f"{ours}.cross.out", f"{theirs}.attn2.to_out.0"),
            *both(f"{ours}.ffn.up", f"{theirs}.ff.conv_inverted", pointwise=True),
            *both(f"{ours}.ffn.depthwise", f"{theirs}.ff.conv_depth"),
            _Entry(f"{ours}.ffn.down.weight", (f"{theirs}.ff.conv_point.weight",), pointwise=True),
        ]
        if shape.qk_norm:
            norms = (
                (f"{a}.norm_{part}.weight", f"{b}.norm_{part}.weight")
                for a, b in (("attention", "attn1"), ("cross", "attn2"))
                for part in "qk"
            )
            entries += [_Entry(f"{ours}.{a}", (f"{theirs}.{b}",)) for a, b in norms]
    return entries


def _shape_of(config: Mapping[str, Any], where: Path, stem_width: int) -> tuple[BackboneConfig, int]:
    """Return our shape of a diffusers config and its latent channels, or say what our network has not."""
    known = {**_SHAPE, **_FIXED, **_WITHOUT_EFFECT}
    values: dict[str, Any] = {**known, **{name: value for name, value in config.items() if not name.startswith("_")}}
    if config.get("_class_name", "SanaTransformer2DModel") != "SanaTransformer2DModel":
        raise SanaError(f"{where}: _class_name: got {config['_class_name']!r}; expected 'SanaTransformer2DModel'")
    if foreign := sorted(set(values) - set(known)):
        raise SanaError(f"{where}: got settings {foreign}; expected those of diffusers 0.42's SanaTransformer2DModel")
    width = values["num_attention_heads"] * values["attention_head_dim"]
    rules = {
        **_FIXED,
        "out_channels": values["in_channels"],
        "cross_attention_dim": width,
        "cross_attention_head_dim": width // values["num_cross_attention_heads"],
        "qk_norm": QK_NORM if values["qk_norm"] is not None else None,
    }
    values["out_channels"] = values["out_channels"] or values["in_channels"]
    for name, expected in rules.items():
        if values[name] != expected:
            raise SanaError(
                f"{where}: {name}: got {values[name]!r}; expected {expected!r}; fix: choose a model without it, ours has no such part"
            )
    shape = BackboneConfig(
        width=width,
        num_blocks=values["num_layers"],
        head_width=values["attention_head_dim"],
        num_cross_heads=values["num_cross_attention_heads"],
        ffn_ratio=values["mlp_ratio"],
        caption_width=values["caption_channels"],
        stem_width=stem_width,
        qk_norm=values["qk_norm"] is not None,
    )
    return shape, values["in_channels"]


def _diffusers_config(model: SanaModel, in_channels: int) -> dict[str, Any]:
    shape = model.shape
    kept = {name: value for name, value in model.origin.items() if name.startswith("_") or name in _WITHOUT_EFFECT}
    return {
        "_class_name": "SanaTransformer2DModel",
        **_WITHOUT_EFFECT,
        **kept,
        **_FIXED,
        "in_channels": in_channels,
        "out_channels": model.latent_channels,
        "num_attention_heads": shape.width // shape.head_width,
        "attention_head_dim": shape.head_width,
        "num_layers": shape.num_blocks,
        "num_cross_attention_heads": shape.num_cross_heads,
        "cross_attention_head_dim": shape.width // shape.num_cross_heads,
        "cross_attention_dim": shape.width,
        "caption_channels": shape.caption_width,
        "mlp_ratio": shape.ffn_ratio,
        "qk_norm": QK_NORM if shape.qk_norm else None,
    }


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Read safetensors: one file, parts with an index, or the one variant (`...fp16.safetensors`) that there is."""
    stem = DIFFUSERS_WEIGHTS.removesuffix(".safetensors")
    whole = folder / DIFFUSERS_WEIGHTS
    if whole.is_file():
        return _load(whole)
    indices = [folder / f"{DIFFUSERS_WEIGHTS}.index.json", *sorted(folder.glob(f"{stem}.safetensors.index.*.json"))]
    for index in (path for path in indices if path.is_file()):
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        if not names or any(Path(name).name != name for name in names):
            raise SanaError(f"{index}: weight_map: got {names[:3]}; expected names of files beside it")
        return {name: value for part in names for name, value in _load(folder / part).items()}
    variants = [path for path in sorted(folder.glob(f"{stem}.*.safetensors")) if "-of-" not in path.name]
    if len(variants) != 1:
        found = [path.name for path in variants]
        raise SanaError(f"{folder}: got {found or 'no weights'}; expected {DIFFUSERS_WEIGHTS}, its index, or one variant of it")
    return _load(variants[0])


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise SanaError(f"{path}: got a file that cannot be read ({error}); expected safetensors; fix: fetch it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SanaError(f"{path}: expected JSON: {error}; fix: name the folder that holds {path.name}") from error
    if not isinstance(content, dict):
        raise SanaError(f"{path}: got {type(content).__name__}; expected a JSON object")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill that becomes `target` once all went well."""
    if target.exists():
        raise SanaError(f"{target}: exists already; expected a new folder; fix: choose another name or remove it")
    temporary = target.with_name(f"{target.name}.part-{uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
