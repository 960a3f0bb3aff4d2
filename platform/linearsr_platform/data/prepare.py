"""Turn photographs into checked shards and a manifest; the same photographs give the same bytes."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from linearsr.config import TextEncoderConfig, TextSource
from linearsr.tags import prompt_of, vocabulary_of
from linearsr.text import TextEncoder
from linearsr_platform import storage
from linearsr_platform.data.images import BadImageError
from linearsr_platform.data.manifest import FILE, VERSION, Manifest, Quarantined, SplitInfo, write_manifest
from linearsr_platform.data.plan import Cut, Photo, inspect, load_photo, pixels_hash, split_photos
from linearsr_platform.data.shards import Sample, write_shard
from linearsr_platform.data.sources import find_candidates
from linearsr_platform.errors import StageError, UserError
from linearsr_platform.recipe.data_schema import DataConfig
from linearsr_platform.recipe.identity import stable_hash

OnProgress = Callable[[int, int, str], None]
"""Called with what is done, the total, and a few words on what comes next."""


@dataclass(frozen=True)
class TextCache:
    """Embeds prompts once each, as shards keep them."""

    config: TextEncoderConfig
    encoder: TextEncoder
    known: dict[str, NDArray[np.float16]]
    """Embeddings (tokens, width) so far, by prompt."""

    def embed(self, tags: Sequence[str]) -> NDArray[np.float16]:
        """Return the embedding (tokens, width) of the prompt of tags.

        Raises:
            UserError: if it does not fit into float16.
        """
        prompt = prompt_of(tags)
        if prompt not in self.known:
            embedding = self.encoder.encode([prompt])
            values = embedding.values[0][embedding.mask[0]].half().numpy()
            if not np.isfinite(values).all():
                raise UserError(
                    f"model.text.folder: got an embedding of {prompt!r} beyond 65504; expected an encoder that float16 can hold"
                )
            self.known[prompt] = values
        return self.known[prompt]

    @property
    def source(self) -> TextSource:
        """What a network must know of the embeddings."""
        null = tuple(tuple(float(value) for value in token) for token in self.embed(()))
        return TextSource(encoder=self.config, digest=self.encoder.digest, null=null)


REASONS_SHOWN = 5
"""Reasons listed in the error when no photograph is left."""


def prepare(
    config: DataConfig,
    *,
    recipe_folder: str,
    output_url: str,
    on_progress: OnProgress | None = None,
    min_shards: int = 1,
    text: TextCache | None = None,
) -> Manifest:
    """Check all photographs, then write `SPLIT/00000.tar` ... and, last, `manifest.json` into the folder `output_url`.

    Every photograph is decoded in a first pass that only checks, so a mistake shows before anything is written, and memory
    holds one at a time. What lay in `output_url` of an earlier run is replaced.

    Args:
        config: the recipe's `data` section.
        recipe_folder: where tables are looked for.
        output_url: folder or fsspec URL.
        on_progress: told about every file and sample.
        min_shards: shards that `train` and `high-quality` have at least, as long as they have samples: training needs one
            for each worker.
        text: embeds the prompts of tags, for a network that reads them; None writes no embeddings.

    Raises:
        UserError: if sources, tables or sizes do not allow a data set; nothing is written.
        StageError: if a photograph changes while this runs.
    """
    report = on_progress or (lambda *_: None)
    candidates = find_candidates(config, recipe_folder)
    photos, refused = inspect(candidates, config, lambda done, name: report(done, len(candidates), f"checking {name}"))
    report(len(candidates), len(candidates), f"checked, {len(refused)} refused")
    if not photos:
        reasons = "; ".join(f"{one.file}: {one.reason}" for one in refused[:REASONS_SHOWN])
        raise UserError(f"data.sources: got {len(refused)} files, none of which can be used ({reasons}); expected photographs")
    splits = split_photos(photos, config, min_shards)
    storage.remove(storage.join(output_url, FILE))
    writer = _Writer(config, output_url, report, sum(map(len, splits.values())), text)
    written = {name: writer.write(name, cuts, min_shards if name in ("train", "high-quality") else 1) for name, cuts in splits.items()}
    manifest = _manifest(config, photos, refused, splits, written, None if text is None else text.source)
    write_manifest(manifest, output_url)
    return manifest


class _Writer:
    """Writes splits one after the other and counts samples over all of them."""

    def __init__(self, config: DataConfig, output_url: str, report: OnProgress, total: int, text: TextCache | None) -> None:
        self._config, self._output_url, self._report, self._total, self._text = config, output_url, report, total, text
        self._done = 0

    def write(self, name: str, cuts: Sequence[Cut], min_shards: int) -> SplitInfo:
        """Write one split, dealt out evenly so that every shard holds a mixture of sources."""
        folder = storage.join(self._output_url, name)
        storage.remove(folder)
        count = min(len(cuts), max(min_shards, ceil(len(cuts) / self._config.samples_per_shard)))
        return SplitInfo(tuple(write_shard(folder, f"{i:05d}.tar", self._samples(name, cuts[i::count])) for i in range(count)))

    def _samples(self, split: str, cuts: Sequence[Cut]) -> Iterator[Sample]:
        for cut in cuts:
            self._report(self._done, self._total, f"writing {split} {cut.key}")
            yield make_sample(cut, self._config, self._text)
            self._done += 1
        self._report(self._done, self._total, f"writing {split}")


def make_sample(cut: Cut, config: DataConfig, text: TextCache | None = None) -> Sample:
    """Read the photograph of a cut again and cut it out; `text` adds the embeddings of its tags.

    Raises:
        StageError: if it is not what it was when it was checked.
    """
    candidate = cut.photo.candidate
    try:
        decoded = load_photo(candidate, config)
    except BadImageError as error:
        raise StageError(f"{candidate.url}: changed while the data was prepared: {error}; fix: run the stage again") from error
    if pixels_hash(decoded) != cut.photo.pixels_sha256:
        raise StageError(f"{candidate.url}: changed while the data was prepared; fix: run the stage again")
    label = candidate.label
    meta: dict[str, object] = {
        "tags": list(label.tags),
        "licence": label.licence,
        "source": label.source or candidate.source,
        "file": candidate.name,
    }
    arrays: dict[str, NDArray[np.generic]] = {}
    if label.tags_lr is not None:
        meta["tags_lr"] = list(label.tags_lr)
    if text is not None:
        meta["text_encoder"] = text.encoder.digest
        arrays["text"] = text.embed(label.tags)
        if label.tags_lr is not None:
            arrays["text_lr"] = text.embed(label.tags_lr)
    if cut.box is None:
        return Sample(cut.key, decoded.pixels, meta, arrays)
    left, top, right, bottom = cut.box
    return Sample(cut.key, decoded.pixels[top:bottom, left:right], {**meta, "crop_box": list(cut.box)}, arrays)


def _manifest(
    config: DataConfig,
    photos: Sequence[Photo],
    refused: Sequence[Quarantined],
    splits: dict[str, list[Cut]],
    written: dict[str, SplitInfo],
    text: TextSource | None,
) -> Manifest:
    counts = {"found": len(photos) + len(refused), "quarantined": len(refused)}
    if tagged_lr := sum(cut.photo.candidate.label.tags_lr is not None for cut in splits["train"]):
        counts["train with tags_lr"] = tagged_lr
    licences = Counter(photo.candidate.label.licence for photo in photos)
    return Manifest(
        version=VERSION,
        recipe_hash=stable_hash(config.model_dump(mode="json")),
        splits=written,
        vocabulary=vocabulary_of(cut.photo.candidate.label.tags for cut in splits["train"]),
        counts=counts | {name: info.samples for name, info in written.items()},
        licences=dict(sorted(licences.items())),
        quarantined=tuple(refused),
        text=text,
    )
