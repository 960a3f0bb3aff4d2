"""Cut photographs into samples and write them as shards, each shard a piece of work that can be done anywhere, and is done once."""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from math import ceil
from typing import Any

import numpy as np
from fsspec import AbstractFileSystem
from numpy.typing import NDArray

from linearsr_platform import storage
from linearsr_platform.data.executor import Choose
from linearsr_platform.data.extras import LatentMaker, TextCache
from linearsr_platform.data.images import BadImageError, decode_image
from linearsr_platform.data.manifest import HELD_OUT, ShardInfo, SplitInfo, prompt_suffix
from linearsr_platform.data.plan import Cut, load_bytes, pixels_hash
from linearsr_platform.data.records import folder_of, read_records, write_record
from linearsr_platform.data.shards import Sample, write_shard
from linearsr_platform.errors import StageError
from linearsr_platform.recipe.data_schema import DataConfig
from linearsr_platform.recipe.identity import stable_hash

LAYOUT = 2
"""Version of what a shard of given samples looks like; records of another one are not used."""
WRITTEN = "written-"
"""What the names of records of shards begin with."""


class PhotoChangedError(StageError):
    """A photograph is not what it was when it was inspected."""


@dataclass(frozen=True)
class Content:
    """What decides the bytes of a sample beside its photograph; picklable."""

    config: DataConfig
    text: TextCache | None = None
    """Embeds the prompts of tags; None writes no embeddings."""
    latents: LatentMaker | None = None
    """Encodes pictures; None writes no latents."""

    def suffix(self, split: str) -> str:
        """Return what the embedded prompts of a split end with."""
        return "" if self.text is None else prompt_suffix(self.text.config, split)

    def identity(self, split: str) -> list[object]:
        """Return it as JSON."""
        text = None if self.text is None else self.text.digest
        latents = None if self.latents is None else self.latents.digest
        halved = {name: source.halve_jpeg for name, source in self.config.sources.items()}
        suffix = self.suffix(split)
        return [LAYOUT, self.config.keep_jpeg, halved, text, latents, *([suffix] if suffix else [])]


@dataclass(frozen=True, slots=True)
class Plan:
    """A shard that is to be written."""

    split: str
    number: int
    cuts: tuple[Cut, ...]
    digest: str
    """Of everything that decides its bytes."""

    @property
    def file(self) -> str:
        """Its name inside the folder of its split."""
        return f"{self.number:05d}.tar"

    @property
    def name(self) -> str:
        """What an error calls it."""
        return f"shard {self.split}/{self.file} ({self.cuts[0].photo.candidate.name} to {self.cuts[-1].photo.candidate.name})"


def plan_shards(split: str, cuts: Sequence[Cut], content: Content, min_shards: int) -> list[Plan]:
    """Deal the samples of a split out evenly, in an order of chance: any part of a shard holds a mixture of sources.

    In order of name, a batch or the first few that validation reads would be of one source. Held-out ones keep it, for reports.
    """
    count = min(len(cuts), max(min_shards, ceil(len(cuts) / content.config.samples_per_shard)))
    if split != HELD_OUT:
        cuts = sorted(cuts, key=lambda cut: sha256(cut.key.encode()).digest())
    plans = []
    for number in range(count):
        dealt = tuple(cuts[number::count])
        plans.append(Plan(split, number, dealt, stable_hash([content.identity(split), [_identity(cut) for cut in dealt]])))
    return plans


def finished_shards(plans: Sequence[Plan], output_url: str) -> list[tuple[Plan, ShardInfo]]:
    """Return what an interrupted run has written: shards with a record of the same samples, whose file has the size it had."""
    records = read_records(folder_of(output_url), WRITTEN)
    found = [(plan, _finished(plan, records, output_url)) for plan in plans]
    return [(plan, info) for plan, info in found if info is not None]


def write_shards(plans: Sequence[Plan], content: Content, output_url: str, choose: Choose) -> Iterator[tuple[Plan, ShardInfo]]:
    """Write shards and yield each, in any order.

    Args:
        plans: of all splits.
        content: what goes into them.
        output_url: folder of the manifest.
        choose: who does the work.
    """
    executor = choose(len({cut.photo.candidate.name for plan in plans for cut in plan.cuts}))
    for position, info in executor.map_unordered(partial(write_plan, content=content, output_url=output_url), plans):
        yield plans[position], info


def write_plan(plan: Plan, *, content: Content, output_url: str) -> ShardInfo:
    """Write one shard and then its record."""
    info = write_shard(storage.join(output_url, plan.split), plan.file, (make_sample(cut, content, plan.split) for cut in plan.cuts))
    write_record(folder_of(output_url), _record_name(plan), {"digest": plan.digest, "shard": asdict(info)})
    return info


def make_sample(cut: Cut, content: Content, split: str) -> Sample:
    """Read the photograph of a cut again and cut it out, for one split.

    Raises:
        PhotoChangedError: if it is not what it was when it was checked.
    """
    candidate, config = cut.photo.candidate, content.config
    try:
        file = load_bytes(candidate)
        decoded = decode_image(file, halve_jpeg=config.sources[candidate.source].halve_jpeg)
    except BadImageError as error:
        raise PhotoChangedError(f"{candidate.name}: changed while the data was prepared: {error}; fix: run the stage again") from error
    if pixels_hash(decoded) != cut.photo.pixels_sha256:
        raise PhotoChangedError(f"{candidate.name}: changed while the data was prepared; fix: run the stage again")
    label = candidate.label
    meta: dict[str, object] = {
        "tags": list(label.tags),
        "licence": label.licence,
        "source": label.source or candidate.source,
        "file": candidate.name,
    }
    if label.tags_lr is not None:
        meta["tags_lr"] = list(label.tags_lr)
    pixels = decoded.pixels
    if cut.box is not None:
        left, top, right, bottom = cut.box
        pixels = pixels[top:bottom, left:right]
        meta["crop_box"] = list(cut.box)
    arrays: dict[str, NDArray[np.generic]] = {}
    if content.text is not None:
        meta["text_encoder"] = content.text.digest
        suffix = content.suffix(split)
        if suffix:
            meta["text_suffix"] = suffix
        arrays["text"] = content.text.embed(label.tags, suffix)
        if label.tags_lr is not None:
            arrays["text_lr"] = content.text.embed(label.tags_lr, suffix)
    if content.latents is not None:
        meta["latent_codec"] = content.latents.digest
        arrays["latent"] = content.latents.encode(pixels)
    kept = file if config.keep_jpeg and decoded.verbatim else None
    return Sample(cut.key, pixels, meta, arrays, jpeg=kept, box=None if kept is None else cut.box)


def split_infos(splits: Mapping[str, object], written: Mapping[tuple[str, int], ShardInfo]) -> dict[str, SplitInfo]:
    """Return the shards of each split in the order of their numbers."""
    return {split: SplitInfo(tuple(info for (name, _), info in sorted(written.items()) if name == split)) for split in splits}


def clear(output_url: str, splits: Mapping[str, SplitInfo]) -> None:
    """Delete the records, and what does not belong to the splits: shards of an earlier run, files that a killed process began."""
    storage.remove(folder_of(output_url))
    for split, info in splits.items():
        folder = storage.join(output_url, split)
        if not info.shards:
            storage.remove(folder)
            continue
        storage.call(folder, partial(_remove_others, names={storage.name_of(shard.url) for shard in info.shards}))


def _remove_others(fs: AbstractFileSystem, path: str, *, names: Container[str]) -> None:
    """Delete the files of a folder that have none of some names."""
    for file in fs.find(path):
        if storage.name_of(file) not in names:
            fs.rm_file(file)


def _identity(cut: Cut) -> list[object]:
    candidate = cut.photo.candidate
    return [cut.key, cut.box, candidate.name, candidate.stamp, asdict(candidate.label), cut.photo.pixels_sha256]


def _record_name(plan: Plan) -> str:
    return f"{WRITTEN}{plan.split}-{plan.number:05d}"


def _finished(plan: Plan, records: Mapping[str, Any], output_url: str) -> ShardInfo | None:
    """Return what an interrupted run made of a plan; None if it did not come to it."""
    record = records.get(_record_name(plan))
    if record is None or record["digest"] != plan.digest:
        return None
    info = ShardInfo(**record["shard"])
    try:
        size, _ = storage.size_and_version(storage.join(output_url, info.url))
    except FileNotFoundError:
        return None
    return info if size == info.bytes else None
