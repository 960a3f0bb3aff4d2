"""What `prepare` wrote: shards with their hashes, splits, vocabulary, licences, and what it refused."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from fsspec import AbstractFileSystem
from pydantic import TypeAdapter, ValidationError

from linearsr.config import TextEncoderConfig, TextSource
from linearsr_platform import storage
from linearsr_platform.errors import StageError, UserError

VERSION = 1
"""Version of the layout of `manifest.json` and of the shards."""
FILE = "manifest.json"
VALIDATION = "validation"
"""The split whose pictures are restored during training, and that is never trained on."""
HELD_OUT = "held-out"
"""The split that a bundle is evaluated on, in the order of its photographs' names."""
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A file that did not become a sample."""

    file: str
    """Source and path below it."""
    reason: str


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One `.tar` of samples."""

    url: str
    """Path below the manifest's folder."""
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class SplitInfo:
    """The shards of one split."""

    shards: tuple[ShardInfo, ...] = ()

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Width and height, in pixels, of the samples of a split."""

    smallest: tuple[int, int]
    median: tuple[int, int]
    largest: tuple[int, int]


@dataclass(frozen=True, slots=True)
class LatentSource:
    """What the latents in shards were made with."""

    codec: str
    """Hash of the codec: see `linearsr.codec_source.codec_digest`."""
    channels: int
    factor: int
    """Pixels per latent along one side; what is left of a picture's right and lower edge has no latent."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything there is to know about a prepared data set without opening its shards."""

    version: int
    recipe_hash: str
    """Hash of the recipe's `data` section."""
    splits: dict[str, SplitInfo]
    """`train`, `validation`, `high-quality` (samples of train again) and `held-out`."""
    vocabulary: tuple[str, ...]
    """Distinct tags of train, in alphabetical order."""
    counts: dict[str, int]
    """Files found and quarantined, how many of these are `duplicates`, and samples of each split."""
    licences: dict[str, int]
    """Photographs by licence; empty text where none was given."""
    quarantined: tuple[Quarantined, ...]
    text: TextSource | None = None
    """Encoder of the embeddings in the shards; None if there are none."""
    latents: LatentSource | None = None
    """Codec of the latents in the shards; None if there are none."""
    tags: dict[str, int] | None = None
    """Samples of train by tag, in the order of the vocabulary; None if an older version prepared them."""
    sizes: dict[str, Sizes] | None = None
    """Of the samples of each split that has some; None if an older version prepared them."""

    @property
    def digest(self) -> str:
        """The sha256 of everything above, hence of every sample: the identity of the data set."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, object]:
        """Return what `manifest.json` holds; what is None is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def shard_urls(self, url: str, split: str) -> tuple[str, ...]:
        """Return the URLs of a split's shards, `url` being the folder of the manifest.

        Raises:
            UserError: if there is no such split or it is empty.
        """
        if split not in self.splits or not self.splits[split].shards:
            filled = [name for name, info in self.splits.items() if info.shards]
            raise UserError(f"{storage.join(url, FILE)}: got split {split!r}; expected one with samples: {', '.join(filled)}")
        return tuple(storage.join(url, shard.url) for shard in self.splits[split].shards)


def prompt_suffix(encoder: TextEncoderConfig, split: str) -> str:
    """Return what the embedded prompts of a split end with: the encoder's suffix where pictures are restored, nothing in training.

    Source: SeeSR (arXiv 2311.16518), test_seesr.py; method.md 2.9.
    """
    return encoder.suffix if split == VALIDATION else ""


def write_manifest(manifest: Manifest, url: str) -> None:
    """Write `manifest.json` into the folder `url`, at once."""
    storage.write_json(storage.join(url, FILE), manifest.to_json())


def load_manifest(url: str) -> Manifest:
    """Read `manifest.json` in the folder `url`.

    Raises:
        UserError: if it is missing, broken or of another version.
    """
    path = storage.join(url, FILE)
    try:
        content = storage.read_json(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: not there; expected the manifest of a prepared data set; fix: run the stage `prepare`") from error
    version = content["version"] if isinstance(content, dict) and "version" in content else None
    if version != VERSION:
        raise UserError(f"{path}: got version {version!r}; expected {VERSION}; fix: run the stage `prepare` again")
    try:
        return TypeAdapter(Manifest).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {where}: got {first['input']!r}; {first['msg']}; fix: run the stage `prepare` again") from error


def verify_shards(manifest: Manifest, url: str, splits: Iterable[str] | None = None) -> None:
    """Read shards and compare them with the manifest in the folder `url`; sizes first, because they cost nothing.

    Args:
        manifest: what should be there.
        url: folder of the manifest.
        splits: names of the splits to verify; None is all of them.

    Raises:
        StageError: if a shard is missing or differs; the message names it.
    """
    names = manifest.splits if splits is None else splits
    shards = [(storage.join(url, shard.url), shard) for name in names for shard in manifest.splits[name].shards]
    for path, shard in shards:
        try:
            size, _ = storage.size_and_version(path)
        except FileNotFoundError as error:
            raise StageError(_broken(path, "no such file", f"{shard.bytes} bytes")) from error
        if size != shard.bytes:
            raise StageError(_broken(path, f"{size} bytes", f"{shard.bytes} bytes"))
    for path, shard in shards:
        sha256 = file_hash(path)
        if sha256 != shard.sha256:
            raise StageError(_broken(path, f"sha256 {sha256}", f"sha256 {shard.sha256}"))


def file_hash(url: str) -> str:
    """Return the sha256 of a file, read in pieces."""
    return storage.call(url, _hash)


def _hash(fs: AbstractFileSystem, path: str) -> str:
    digest = hashlib.sha256()
    with fs.open(path, "rb") as stream:
        while piece := stream.read(CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _broken(path: str, got: str, expected: str) -> str:
    return f"shard {path}: got {got}; expected {expected} as in {FILE}; fix: run the stage `prepare` again"
