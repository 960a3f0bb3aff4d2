"""Turn photographs into checked shards and a manifest; the same photographs give the same bytes."""

from collections import Counter
from collections.abc import Mapping, Sequence

from linearsr.tags import vocabulary_of
from linearsr_platform import storage
from linearsr_platform.data.executor import Choose, OnProgress, alone
from linearsr_platform.data.extras import LatentMaker, TextCache
from linearsr_platform.data.manifest import FILE, VERSION, Manifest, Quarantined, Sizes, SplitInfo, write_manifest
from linearsr_platform.data.plan import DUPLICATE, Cut, Photo, inspect, split_photos
from linearsr_platform.data.records import folder_of
from linearsr_platform.data.sources import find_candidates
from linearsr_platform.data.writing import Content, PhotoChangedError, clear, finished_shards, plan_shards, split_infos, write_shards
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.data_schema import DataConfig
from linearsr_platform.recipe.identity import stable_hash

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
    latents: LatentMaker | None = None,
    choose: Choose = alone,
    choose_writers: Choose | None = None,
) -> Manifest:
    """Check all photographs, then write `SPLIT/00000.tar` ... and, last, `manifest.json` into the folder `output_url`.

    Every photograph is decoded in a first pass that only checks, so a mistake shows before any shard is written. Whatever piece of
    this is finished when the process ends is not done again by the next call with the same input: each leaves a record, and the
    records go when the manifest is there. What lay in `output_url` of an earlier run is replaced.

    Args:
        config: the recipe's `data` section.
        recipe_folder: where tables are looked for.
        output_url: folder or fsspec URL.
        on_progress: told about every finished piece of work.
        min_shards: shards that `train` and `high-quality` have at least, as long as they have samples: training needs one
            for each worker.
        text: embeds the prompts of tags, for a network that reads them; None writes no embeddings.
        latents: encodes pictures; None writes no latents.
        choose: who looks at the files, given their number; the result is the same, whoever does.
        choose_writers: who writes the shards, for which `text` and `latents` are needed; None is who looks.

    Raises:
        UserError: if sources, tables or sizes do not allow a data set; no shard is written.
        StageError: if a photograph changes while this runs, or cannot be reached.
    """
    report = on_progress or (lambda *_: None)
    candidates = find_candidates(config, recipe_folder, choose, report)
    photos, refused = inspect(candidates, config, output_url, choose, report)
    if not photos:
        storage.remove(folder_of(output_url))
        if not storage.list_files(output_url):
            storage.remove(output_url)
        reasons = "; ".join(f"{one.file}: {one.reason}" for one in refused[:REASONS_SHOWN])
        raise UserError(f"data.sources: got {len(refused)} files, none of which can be used ({reasons}); expected photographs")
    splits = split_photos(photos, config, min_shards)
    _check_held_out(splits["held-out"])
    storage.remove(storage.join(output_url, FILE))
    content = Content(config, text, latents)
    try:
        written = _write(splits, content, output_url, min_shards, choose_writers or choose, report)
    except PhotoChangedError:
        # What the inspections found out is no longer so, whatever the time of the file's change says.
        storage.remove(folder_of(output_url))
        raise
    manifest = _manifest(content, photos, refused, splits, written)
    write_manifest(manifest, output_url)
    clear(output_url, written)
    return manifest


def _write(
    splits: Mapping[str, Sequence[Cut]], content: Content, output_url: str, min_shards: int, choose: Choose, report: OnProgress
) -> dict[str, SplitInfo]:
    """Write what an interrupted run has not written."""
    plans = [
        plan
        for split, cuts in splits.items()
        for plan in plan_shards(split, cuts, content, min_shards if split in ("train", "high-quality") else 1)
    ]
    total = sum(len(plan.cuts) for plan in plans)
    finished = finished_shards(plans, output_url)
    infos = {(plan.split, plan.number): info for plan, info in finished}
    done = sum(info.samples for info in infos.values())
    report(done, total, f"writing samples, resumed: {len(finished)} of {len(plans)} shards were there" if finished else "writing samples")
    todo = [plan for plan in plans if (plan.split, plan.number) not in infos]
    for plan, info in write_shards(todo, content, output_url, choose):
        infos[plan.split, plan.number] = info
        done += info.samples
        report(done, total, "writing samples")
    return split_infos(splits, infos)


def _check_held_out(cuts: Sequence[Cut]) -> None:
    """Refuse, before anything is trained on the others, names under which two photographs could not be told apart when evaluated.

    Raises:
        UserError: naming both.
    """
    known: dict[str, str] = {}
    for cut in cuts:
        candidate = cut.photo.candidate
        name = candidate.stem
        if name in known:
            raise UserError(
                f"data.held_out: got {known[name]} and {candidate.name}, both named {name!r}; expected names that differ; "
                "fix: rename one, or hold out another"
            )
        known[name] = candidate.name


def _manifest(
    content: Content,
    photos: Sequence[Photo],
    refused: Sequence[Quarantined],
    splits: Mapping[str, Sequence[Cut]],
    written: dict[str, SplitInfo],
) -> Manifest:
    duplicates = sum(one.reason.startswith(DUPLICATE) for one in refused)
    counts = {"found": len(photos) + len(refused), "quarantined": len(refused), "duplicates": duplicates}
    if tagged_lr := sum(cut.photo.candidate.label.tags_lr is not None for cut in splits["train"]):
        counts["train with tags_lr"] = tagged_lr
    licences = Counter(photo.candidate.label.licence for photo in photos)
    vocabulary = vocabulary_of(cut.photo.candidate.label.tags for cut in splits["train"])
    tags = Counter(tag for cut in splits["train"] for tag in cut.photo.candidate.label.tags)
    return Manifest(
        version=VERSION,
        recipe_hash=stable_hash(content.config.identity()),
        splits=written,
        vocabulary=vocabulary,
        counts=counts | {name: info.samples for name, info in written.items()},
        licences=dict(sorted(licences.items())),
        quarantined=tuple(refused),
        text=None if content.text is None else content.text.source,
        latents=None if content.latents is None else content.latents.source,
        tags={tag: tags[tag] for tag in vocabulary},
        sizes={split: _sizes(cuts) for split, cuts in splits.items() if cuts},
    )


def _sizes(cuts: Sequence[Cut]) -> Sizes:
    ordered = sorted((cut.size_px for cut in cuts), key=lambda size: (size[0] * size[1], size))
    return Sizes(ordered[0], ordered[len(ordered) // 2], ordered[-1])
