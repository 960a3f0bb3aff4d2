"""A released model: a folder of safetensors and JSON that holds every expert and what ties them together.

Nothing in it is executable: only safetensors and JSON are read, and every file is checked against its hash first.
A DC-AE stays outside: a bundle names where it was and its hash, and none but that one decodes what the bundle's experts make.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from linearsr.codec_source import CodecError, codec_digest, find_autoencoder, verify_codec
from linearsr.config import (
    BackboneConfig,
    CodecConfig,
    ExpertsConfig,
    FlowConfig,
    LatentStatistics,
    ModelConfig,
    SamplerConfig,
    TagsConfig,
    TextEncoderConfig,
    TextSource,
)

FORMAT = "linearsr-bundle/1"
MANIFEST = "bundle.json"
NULL_TEXT = "null-text.safetensors"
"""Embedding of the null prompt, in a bundle whose network reads prompts."""
PRECISIONS = ("float32", "bfloat16")
_KEYS = ("boundaries", "codec", "config", "files", "format", "lineage", "precision", "sampler", "statistics")


class BundleError(ValueError):
    """A bundle cannot be read or written; the message says which file, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle on disk whose files were checked."""

    folder: Path
    config: ModelConfig
    statistics: LatentStatistics
    boundaries: tuple[float, ...]
    """Ascending noise levels; one expert more than boundaries."""
    sampler: SamplerConfig
    """How pictures are drawn unless the caller says otherwise."""
    experts: tuple[Path, ...]
    """Weights, noisiest expert first."""
    precision: str
    """Dtype that the network runs in: part of the model's identity."""
    codec_digest: str
    """Identity of the codec that the experts were trained with; see `linearsr.codec_source.codec_digest`."""
    lineage: Mapping[str, Any]
    """What it was made from: hashes, knee steps, parents."""
    digest: str
    """SHA-256 of `bundle.json`, which holds the hashes of all other files."""
    text: TextSource | None = None
    """Text encoder that the network was trained with, which only tags need; None if it knows tags by id."""


def save_bundle(
    folder: Path,
    *,
    config: ModelConfig,
    statistics: LatentStatistics,
    boundaries: Sequence[float],
    sampler: SamplerConfig,
    expert_weights: Sequence[Path],
    lineage: Mapping[str, object],
    precision: str = "float32",
    text: TextSource | None = None,
) -> Bundle:
    """Write a bundle to `folder`, whole or not at all, and return it as `load_bundle` would.

    Args:
        folder: Made here; must not exist.
        config, statistics, boundaries, sampler, precision, text: See `Bundle`.
        expert_weights: Safetensors files, noisiest expert first.
        lineage: What the model was made from, JSON-able.

    Raises:
        BundleError: if the folder exists, weights are missing, or there is not one expert more than boundaries.
        CodecError: if the codec's weights are not there, so that it has no hash.
    """
    if folder.exists():
        raise BundleError(f"{folder}: exists already; expected a new folder; fix: choose another name or remove it")
    if len(expert_weights) != len(boundaries) + 1:
        raise BundleError(f"bundle: got {len(expert_weights)} experts for boundaries {tuple(boundaries)}; expected {len(boundaries) + 1}")
    absent = [str(path) for path in expert_weights if not path.is_file()]
    if absent:
        raise BundleError(f"bundle: got no file at {', '.join(absent)}; expected the weights of every expert; fix: train the missing ones")
    temporary = folder.with_name(f"{folder.name}.part-{uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        files = {}
        for index, source in enumerate(expert_weights, start=1):
            name = f"expert-{index}.safetensors"
            shutil.copyfile(source, temporary / name)
            files[name] = _sha256(temporary / name)
        content: dict[str, Any] = {
            "format": FORMAT,
            "codec": codec_digest(config.codec),
            "config": asdict(config),
            "statistics": asdict(statistics),
            "boundaries": list(boundaries),
            "sampler": sampler.to_plain(),
            "precision": precision,
            "files": files,
            "lineage": dict(lineage),
        }
        if text is not None:
            save_file({"null": torch.tensor(text.null)}, temporary / NULL_TEXT)
            files[NULL_TEXT] = _sha256(temporary / NULL_TEXT)
            content["text"] = {"encoder": asdict(text.encoder), "digest": text.digest}
        (temporary / MANIFEST).write_text(json.dumps(content, indent=1, sort_keys=True, allow_nan=False), encoding="utf-8")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return load_bundle(folder)


def load_bundle(folder: Path, *, codec_source: str | None = None) -> Bundle:
    """Read a bundle and check every file against its hash, and the codec too if it can be found.

    Args:
        folder: With `bundle.json`.
        codec_source: Where the DC-AE is on this machine, if not where it was when the bundle was made.

    Raises:
        BundleError: naming the file that is missing, foreign or changed, or both hashes of another codec.
    """
    manifest = Path(folder) / MANIFEST
    content, digest = _content(manifest)
    try:
        bundle = _parse(manifest.parent, content, digest)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{manifest}: expected the fields of {FORMAT}: {error}; fix: assemble the bundle again") from error
    for name, expected in content["files"].items():
        path = manifest.parent / name
        got = _sha256(path) if path.is_file() else "no file"
        if got != expected:
            raise BundleError(f"{path}: got SHA-256 {got}; expected {expected}; fix: fetch the bundle again, it was changed or cut short")
    if "text" in content:
        bundle = replace(bundle, text=_text(manifest, content["text"]))
    return _with_checked_codec(manifest, bundle, codec_source)


def text_of(folder: Path) -> TextSource | None:
    """Return the text encoder of the bundle in a folder; None if its network knows tags by id. Weights are not read.

    Raises:
        BundleError: if there is no bundle, or its text is damaged.
    """
    manifest = Path(folder) / MANIFEST
    content, _ = _content(manifest)
    return _text(manifest, content["text"]) if "text" in content else None


def with_text_encoder(bundle: Bundle, folder: str) -> Bundle:
    """Return the bundle with its text encoder in another folder than where it was trained; the encoder must still be the same one.

    Raises:
        BundleError: if its network reads no prompts.
    """
    if bundle.text is None:
        raise BundleError(f"{bundle.folder}: got text encoder {folder}; expected none: its network knows tags by id; fix: leave it out")
    return replace(bundle, text=replace(bundle.text, encoder=replace(bundle.text.encoder, folder=folder)))


def with_codec_tile(bundle: Bundle, tile: int) -> Bundle:
    """Return the bundle with its DC-AE coding in tiles of `tile` positions a side: it takes other memory and gives another picture.

    Raises:
        BundleError: if its codec has no tiles, or not of that size.
    """
    codec = bundle.config.codec
    if codec.kind != "dc-ae":
        raise BundleError(f"{bundle.folder}: got a tile of {tile} for codec {codec.kind}, which has none; expected none; fix: leave it out")
    try:
        return replace(bundle, config=replace(bundle.config, codec=replace(codec, tile=tile)))
    except ValueError as error:
        raise BundleError(f"{bundle.folder}: {error}") from error


def _with_checked_codec(manifest: Path, bundle: Bundle, codec_source: str | None) -> Bundle:
    """Return the bundle with its codec's source as it is here; a DC-AE that is not there is found missing when it is needed."""
    codec = bundle.config.codec
    try:
        if codec_source is not None:
            codec = replace(codec, source=codec_source)
        elif codec.source is not None and not _is_there(codec.source):
            return bundle
        verify_codec(codec, bundle.codec_digest)
    except ValueError as error:
        raise BundleError(f"{manifest}: {error}") from error
    return replace(bundle, config=replace(bundle.config, codec=codec))


def _is_there(source: str) -> bool:
    try:
        find_autoencoder(source)
    except CodecError:
        return False
    return True


def _content(manifest: Path) -> tuple[dict[str, Any], str]:
    """Return what `bundle.json` says, and its SHA-256."""
    try:
        raw = manifest.read_bytes()
        content = json.loads(raw)
    except (OSError, RecursionError, ValueError) as error:
        raise BundleError(f"{manifest}: expected a bundle's JSON: {error}; fix: name the folder that holds bundle.json") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        got = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise BundleError(f"{manifest}: format: got {got!r}; expected {FORMAT!r}; fix: assemble the bundle with this version")
    return content, hashlib.sha256(raw).hexdigest()


def _parse(folder: Path, content: Mapping[str, Any], digest: str) -> Bundle:
    # Bundles from before there was a DC-AE do not say which codec made them: an embedded one, of version 1.
    if sorted({"codec", *content} - {"text"}) != sorted(_KEYS):
        raise ValueError(f"keys: got {sorted(content)}; expected {list(_KEYS)}")
    if content["precision"] not in PRECISIONS:
        raise ValueError(f"precision: got {content['precision']!r}; expected one of {', '.join(PRECISIONS)}")
    boundaries = ExpertsConfig(boundaries=tuple(float(t) for t in content["boundaries"])).boundaries
    names = [f"expert-{index}.safetensors" for index in range(1, len(boundaries) + 2)]
    expected = [*names, NULL_TEXT] if "text" in content else names
    if sorted(content["files"]) != sorted(expected):
        raise ValueError(f"files: got {sorted(content['files'])}; expected {expected}")
    config = _model_config(content["config"])
    if "codec" not in content and config.codec.kind == "dc-ae":
        raise ValueError("codec: got no hash; expected that of the DC-AE")
    return Bundle(
        folder=folder,
        config=config,
        statistics=LatentStatistics(**{name: tuple(values) for name, values in content["statistics"].items()}),
        boundaries=boundaries,
        sampler=_sampler(content["sampler"]),
        experts=tuple(folder / name for name in names),
        precision=content["precision"],
        codec_digest=str(content["codec"]) if "codec" in content else codec_digest(config.codec, version=1),
        lineage=dict(content["lineage"]),
        digest=digest,
    )


def _text(manifest: Path, value: Mapping[str, Any]) -> TextSource:
    try:
        null = load_file(manifest.parent / NULL_TEXT)["null"]
        tokens = tuple(tuple(float(number) for number in token) for token in null)
        return TextSource(encoder=TextEncoderConfig(**value["encoder"]), digest=str(value["digest"]), null=tokens)
    except (KeyError, SafetensorError, TypeError, ValueError) as error:
        raise BundleError(
            f"{manifest}: text: got {error}; expected an encoder and its null prompt; fix: assemble the bundle again"
        ) from error


def _model_config(value: Mapping[str, Any]) -> ModelConfig:
    parts = dict(value)
    tags = dict(parts.pop("tags"))
    return ModelConfig(
        codec=CodecConfig(**parts.pop("codec")),
        backbone=BackboneConfig(**parts.pop("backbone")),
        flow=FlowConfig(**parts.pop("flow")),
        tags=TagsConfig(vocabulary=tuple(tags.pop("vocabulary")), **tags),
        **parts,
    )


def _sampler(value: Mapping[str, Any]) -> SamplerConfig:
    parts = dict(value)
    times = parts.pop("times")
    return SamplerConfig(times=None if times is None else tuple(times), **parts)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
