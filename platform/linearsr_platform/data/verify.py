"""Check a prepared data set against its manifest, down to every sample: everything that is wrong, not only the first of it."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from linearsr_platform import storage
from linearsr_platform.data.executor import OnProgress
from linearsr_platform.data.images import BadImageError, Pixels, decode_stored
from linearsr_platform.data.manifest import Manifest, ShardInfo, file_hash, prompt_suffix
from linearsr_platform.data.members import read_array, read_object
from linearsr_platform.data.picture_shards import Members, read_members
from linearsr_platform.errors import StageError

PICTURES = ("png", "jpg")
"""Members that hold the picture of a sample; it has one of them."""
ORDER = ("train", "high-quality", "validation", "held-out")
"""Splits in the order in which they are read: held-out ones are compared with what was trained on."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong."""

    where: str
    """Shard below the manifest's folder, with the key of the sample if it is about one."""
    what: str
    """`got ...; expected ...`."""


@dataclass
class Verification:
    """What came out."""

    problems: list[Problem] = field(default_factory=list)
    shards: int = 0
    samples: int = 0


@dataclass
class _Seen:
    """What the samples read so far say about those to come."""

    hashes: dict[str, dict[str, str]] = field(default_factory=dict)
    """Split -> key -> hash of the stored picture."""
    files: dict[str, str] = field(default_factory=dict)
    """File of origin of what is trained or validated on -> where it lies."""
    pixels: dict[tuple[int, int], dict[bytes, str]] = field(default_factory=dict)
    """Height and width -> hash of the pixels that are trained on -> where they lie."""


def verify_data_set(manifest: Manifest, url: str, on_progress: OnProgress | None = None) -> Verification:
    """Read every shard once and check hashes, sizes, labels, arrays and keys, and that nothing held out is trained on.

    Args:
        manifest: what should be there.
        url: its folder.
        on_progress: told about every shard.
    """
    result, seen = Verification(), _Seen()
    report = on_progress or (lambda *_: None)
    splits = sorted(manifest.splits, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    total = sum(len(manifest.splits[split].shards) for split in splits)
    for split in splits:
        for shard in manifest.splits[split].shards:
            result.problems += [Problem(where, what) for where, what in _shard(manifest, url, split, shard, seen, result)]
            result.shards += 1
            report(result.shards, total, f"verifying {shard.url}")
    return result


def _shard(manifest: Manifest, url: str, split: str, shard: ShardInfo, seen: _Seen, result: Verification) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a shard and its samples: where, and what."""
    try:
        with storage.local_path(storage.join(url, shard.url)) as path:
            size, sha256 = path.stat().st_size, file_hash(str(path))
            if size != shard.bytes:
                yield shard.url, f"got {size} bytes; expected {shard.bytes}"
            elif sha256 != shard.sha256:
                yield shard.url, f"got sha256 {sha256}; expected {shard.sha256}"
            count = 0
            for key, members in read_members(str(path)):
                count += 1
                for what in _sample(manifest, split, key, members, f"{shard.url}:{key}", seen):
                    yield f"{shard.url}:{key}", what
            result.samples += count
            if count != shard.samples:
                yield shard.url, f"got {count} samples; expected {shard.samples}"
    except FileNotFoundError:
        yield shard.url, "got no such file; expected it, as the manifest names it"
    except StageError as error:
        yield shard.url, f"got a file that cannot be read to its end ({error.__cause__}); expected a WebDataset tar"


def _sample(manifest: Manifest, split: str, key: str, members: Members, where: str, seen: _Seen) -> Iterator[str]:
    """Yield what is wrong with a sample."""
    pictures = [name for name in PICTURES if name in members]
    if len(pictures) != 1:
        yield f"got {' and '.join(pictures) or 'no picture'}; expected one of {', '.join(PICTURES)}"
        return
    content = members[pictures[0]]
    sha256 = hashlib.sha256(content).hexdigest()
    yield from _key(split, key, sha256, seen)
    try:
        meta = read_object(members["json"])
    except (KeyError, ValueError) as error:
        yield f"got no readable json ({error}); expected what is known about the sample"
        return
    if sha256 != meta.get("sha256"):
        yield f"got sha256 {sha256}; expected {meta.get('sha256')}, as its json says"
    yield from _tags(manifest, split, meta)
    try:
        box = meta.get("box")
        pixels = decode_stored(content, None if box is None else tuple(box))
    except (BadImageError, TypeError, ValueError) as error:
        yield f"got a picture that cannot be used: {error}"
        return
    said = (meta.get("width_px"), meta.get("height_px"))
    if said != (pixels.shape[1], pixels.shape[0]):
        yield f"got {pixels.shape[1]}x{pixels.shape[0]} px; expected {said[0]}x{said[1]}, as its json says"
    yield from _arrays(manifest, split, members, meta, pixels)
    yield from _leaks(split, str(meta.get("file")), pixels, where, seen)


def _key(split: str, key: str, sha256: str, seen: _Seen) -> Iterator[str]:
    known = seen.hashes.setdefault(split, {})
    if key in known:
        yield f"got a key that another sample of {split!r} has; expected one of its own"
    known[key] = sha256
    if split == "high-quality" and seen.hashes.get("train", {}).get(key) != sha256:
        yield "got a sample that is not in train as it is; expected a part of train"


def _tags(manifest: Manifest, split: str, meta: Mapping[str, Any]) -> Iterator[str]:
    for name in ("tags", "tags_lr"):
        tags = meta.get(name, None if name == "tags" else [])
        if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            yield f"got {name} {tags!r}; expected a list of words"
        elif name == "tags" and split in ("train", "high-quality"):
            unknown = sorted(set(tags) - set(manifest.vocabulary))
            if unknown:
                yield f"got tags {', '.join(unknown)}; expected words of the manifest's vocabulary"


def _arrays(manifest: Manifest, split: str, members: Members, meta: Mapping[str, Any], pixels: Pixels) -> Iterator[str]:
    """Yield what is wrong with the embeddings and the latent of a sample."""
    expected: dict[str, tuple[str, str, str]] = {}
    if manifest.text is not None:
        for name in ("text", "text_lr") if "tags_lr" in meta else ("text",):
            expected[name] = ("text_encoder", manifest.text.digest, f"(1 to {manifest.text.encoder.max_tokens}, {manifest.text.width})")
        suffix = prompt_suffix(manifest.text.encoder, split)
        if meta.get("text_suffix", "") != suffix:
            yield f"got text_suffix {meta.get('text_suffix')!r}; expected {suffix!r}, as the manifest says"
    if manifest.latents is not None:
        height, width = (side // manifest.latents.factor for side in pixels.shape[:2])
        expected["latent"] = ("latent_codec", manifest.latents.codec, f"({manifest.latents.channels}, {height}, {width})")
    for name in ("text", "text_lr", "latent"):
        member = members.get(f"{name}.npy")
        if (name in expected) != (member is not None):
            got, wanted = ("none", "one") if member is None else ("one", "none")
            yield f"array {name}: got {got}; expected {wanted}, as the manifest says"
        elif member is not None:
            key, digest, shape = expected[name]
            if meta.get(key) != digest:
                yield f"got {key} {meta.get(key)}; expected {digest}, as the manifest says"
            yield from _array(name, member, shape, manifest)


def _array(name: str, member: bytes, shape: str, manifest: Manifest) -> Iterator[str]:
    try:
        array = read_array(member)
    except ValueError as error:
        yield f"got an array {name} that cannot be read: {error}"
        return
    if name == "latent":
        right = str(array.shape) == shape
    else:
        text = manifest.text
        right = text is not None and array.ndim == 2 and 1 <= len(array) <= text.encoder.max_tokens and array.shape[1] == text.width
    if not right or array.dtype.kind != "f":
        yield f"got an array {name} of shape {array.shape} and type {array.dtype}; expected {shape}, float"
    elif not np.isfinite(array).all():
        yield f"got an array {name} with NaN or infinity; expected finite numbers"


def _leaks(split: str, file: str, pixels: Pixels, where: str, seen: _Seen) -> Iterator[str]:
    """Yield where a held-out photograph, whole or without its validation strip, is trained on; remember what is."""
    height, width = pixels.shape[:2]
    if split in ("train", "high-quality"):
        seen.pixels.setdefault((height, width), {}).setdefault(_hash(pixels), where)
    if split != "held-out":
        seen.files.setdefault(file, where)
        return
    if file in seen.files:
        yield f"got the file {file}, which is in {seen.files[file]} too; expected held-out photographs nowhere else"
    for (other_height, other_width), hashes in seen.pixels.items():
        # A strip is cut off one end, so one side of what is left is the photograph's.
        fits = other_height <= height and other_width <= width and (other_height == height or other_width == width)
        found = hashes.get(_hash(pixels[:other_height, :other_width])) if fits else None
        if found is not None:
            yield f"got a picture that is trained on as {found}; expected held-out photographs nowhere else"


def _hash(pixels: Pixels) -> bytes:
    return hashlib.sha256(pixels.tobytes()).digest()
