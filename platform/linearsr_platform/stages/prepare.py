"""Stage `prepare`: photographs to checked shards."""

from collections.abc import Mapping

from linearsr.codec_source import codec_digest
from linearsr.config import TextEncoderConfig
from linearsr.text import TextEncoderError, encoder_digest, make_encoder
from linearsr_platform import storage
from linearsr_platform.cluster.capacity import Share
from linearsr_platform.cluster.experts import room_now
from linearsr_platform.cluster.preparing import ONE_CPU, RayExecutor
from linearsr_platform.data.executor import Executor, SerialExecutor
from linearsr_platform.data.extras import LatentMaker, TextCache
from linearsr_platform.data.manifest import FILE as MANIFEST
from linearsr_platform.data.manifest import Manifest, load_manifest
from linearsr_platform.data.prepare import prepare
from linearsr_platform.data.sources import Found, list_source
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.identity import stable_hash
from linearsr_platform.stages.context import RecipeContext, StageOutput, StageResult
from linearsr_platform.stages.model_work import ModelWork, preparing_work
from linearsr_platform.tracking.runs import TrackedRun

NAME = "prepare"
SIZES = "file_sizes"
"""Key of the result's data: `_sizes` before the files were read."""
MESSAGES = 20
"""Quarantined files that get a line of their own."""


def settings(context: RecipeContext) -> object:
    """Return the data section, the tables' contents and which files the sources hold now, so new photographs are noticed.

    Not the number of workers, although a fresh run has a shard for each at least: a run may go on with others.
    """
    data = context.recipe.data
    listings = _listings(context)
    # In a store of a million files a listing takes minutes: `run` and `remark` go by this one.
    context.file_sizes = _hash_of_sizes(listings)
    tables = {source.table for source in data.sources.values() if source.table}
    found: dict[str, object] = {
        "data": data.identity(),
        "tables": {table: stable_hash(_table(context, table)) for table in sorted(tables)},
        "files": {name: sorted(found) for name, found in listings.items()},
    }
    text = context.recipe.model.text
    # Only if set: runs without them keep their finished stages. LR tags may have been added to files that were there.
    found |= {} if text is None else {"text": _digest(text)}
    found |= {"text_suffix": text.suffix} if text is not None and text.suffix else {}
    found |= {"codec": codec_digest(context.codec)} if data.latents else {}
    return found | ({"tags_lr": True} if context.recipe.model.tags_from_lr else {})


def run(context: RecipeContext, url: str, tracked: TrackedRun) -> StageOutput:
    """Write shards and manifest below `url`."""
    sizes = _sizes(context)
    manifest = write_data(context, url)
    counts = {split: info.samples for split, info in manifest.splits.items()}
    duplicates = manifest.counts["duplicates"]
    tracked.log_params({"samples": counts, "quarantined": len(manifest.quarantined), "duplicates": duplicates, "digest": manifest.digest})
    for refused in manifest.quarantined[:MESSAGES]:
        context.display.message(f"quarantined {refused.file}: {refused.reason}")
    if len(manifest.quarantined) > MESSAGES:
        context.display.message(f"... and {len(manifest.quarantined) - MESSAGES} more, all in {storage.join(url, MANIFEST)}")
    return StageOutput(_summary(manifest), {"digest": manifest.digest, SIZES: sizes}, content=manifest.digest)


def remark(context: RecipeContext, found: StageResult) -> str:
    """Say if files have another size than when they were prepared: names alone decide whether that is done again."""
    if found.data.get(SIZES) in (None, _sizes(context)):
        return ""
    return "photographs or side files have changed since, and what they were then is used; fix: `--from prepare` takes them anew"


def _sizes(context: RecipeContext) -> str:
    """Return a hash of the sizes of all files of the sources, as of when the stage's settings were read."""
    return context.file_sizes or _hash_of_sizes(_listings(context))


def _listings(context: RecipeContext) -> dict[str, dict[str, Found]]:
    return {name: list_source(name, source) for name, source in sorted(context.recipe.data.sources.items())}


def _hash_of_sizes(listings: Mapping[str, Mapping[str, Found]]) -> str:
    return stable_hash({name: {file: one.bytes for file, one in sorted(found.items())} for name, found in listings.items()})


def write_data(context: RecipeContext, url: str) -> Manifest:
    """Write shards and manifest below `url`, and refuse too little data for the recipe's workers."""
    config = context.recipe.data

    def on_progress(done: int, total: int, what: str) -> None:
        kind, _, resumed = what.partition(", ")
        if resumed:
            context.display.message(f"{kind}: {resumed}")
        context.display.update(kind.split()[0], done, total)

    work = preparing_work(context.recipe)
    device = work.device(context.recipe)
    text = text_cache(context, device)
    manifest = prepare(
        config,
        recipe_folder=context.loaded.folder,
        output_url=url,
        on_progress=on_progress,
        min_shards=_most_workers(context),
        text=text,
        latents=LatentMaker(context.codec, codec_digest(context.codec), device) if config.latents else None,
        choose=lambda count: _executor(context, count, work, None, ONE_CPU),
        choose_writers=lambda count: _executor(context, count, work, text),
    )
    _refuse_too_few(context, manifest)
    return manifest


def _executor(context: RecipeContext, count: int, work: ModelWork, text: TextCache | None, share: Share | None = None) -> Executor:
    """Return who works on that many files: Ray's tasks where they are worth a cluster.

    Args:
        context: the recipe.
        count: of photographs.
        work: what models do with each of them.
        text: the driver's own text encoder, which it does not need if others write shards.
        share: of a task; None for one that has the models.
    """
    if not work.wants_cluster(context.recipe, count):
        return SerialExecutor()
    if text is not None:
        text.let_go()
    context.open_cluster()
    chosen = work.share(context.recipe, room_now()) if share is None else share
    return RayExecutor(chosen, patience_s=context.recipe.cluster.queue_timeout_s)


def _summary(manifest: Manifest) -> str:
    duplicates = manifest.counts["duplicates"]
    parts = [f"{info.samples} {split}" for split, info in manifest.splits.items()]
    others = {"quarantined": len(manifest.quarantined) - duplicates, "duplicates": duplicates}
    return ", ".join([*parts, *(f"{count} {what}" for what, count in others.items() if count)])


def text_cache(context: RecipeContext, device: str = "cpu") -> TextCache | None:
    """Return what embeds prompts, loaded, and on workers by `device`; None for a network that learns its own embedding.

    Raises:
        UserError: if the encoder cannot be loaded, or has another width than the network expects.
    """
    model = context.recipe.model
    if model.text is None:
        return None
    try:
        encoder = make_encoder(model.text)
    except TextEncoderError as error:
        raise UserError(str(error)) from error
    expected = model.resolved_backbone.caption_width
    if encoder.width != expected:
        raise UserError(
            f"model.text: got an encoder of width {encoder.width}; expected the backbone's caption_width, {expected}; fix: set it"
        )
    return TextCache(model.text, encoder, device)


def _digest(text: TextEncoderConfig) -> str:
    try:
        return encoder_digest(text)
    except TextEncoderError as error:
        raise UserError(str(error)) from error


def manifest_of(context: RecipeContext) -> Manifest:
    """Return the manifest that `prepare` wrote.

    Raises:
        UserError: if its latents are by another codec than the recipe's.
    """
    manifest = load_manifest(context.results["prepare"].url)
    if manifest.latents is not None and manifest.latents.codec != (digest := codec_digest(context.codec)):
        raise UserError(
            f"{context.results['prepare'].url}: got latents of codec {manifest.latents.codec}; expected {digest}, the recipe's; "
            "fix: run with `--from prepare`, or give model.codec the weights that the data was made with"
        )
    return manifest


def shards_of(context: RecipeContext, split: str) -> tuple[str, ...]:
    """Return the shard URLs of a split."""
    return manifest_of(context).shard_urls(context.results["prepare"].url, split)


def _table(context: RecipeContext, table: str) -> str:
    url = storage.absolute(table, context.loaded.folder)
    if not storage.exists(url):
        raise UserError(f"data.sources: table: got {table!r}; expected a CSV file beside the recipe, looked for {url}")
    return storage.read_text(url)


def _most_workers(context: RecipeContext) -> int:
    recipe = context.recipe
    return max(recipe.pretrain.workers, recipe.experts.train.workers, recipe.finetune.train.workers)


def _refuse_too_few(context: RecipeContext, manifest: Manifest) -> None:
    """Refuse before any trainer starts what its readers would refuse."""
    recipe = context.recipe
    needed: dict[str, int] = {"validation": 1, "held-out": 1}
    needed["train"] = max(recipe.pretrain.workers, recipe.experts.train.workers)
    needed[recipe.finetune.subset] = max(needed.get(recipe.finetune.subset, 0), recipe.finetune.train.workers)
    tagged = manifest.counts.get("train with tags_lr", 0)
    if recipe.model.tags_from_lr and tagged < manifest.splits["train"].samples:
        raise UserError(
            f"model.tags_from_lr: got {recipe.model.tags_from_lr} with {tagged} of {manifest.splits['train'].samples} training photographs "
            "that have tags_lr; expected all; fix: `linearsr tag FOLDER --lr`"
        )
    for split, workers in needed.items():
        shards = len(manifest.splits[split].shards)
        if shards < workers:
            raise UserError(
                f"prepare: got {shards} shards in split {split!r}; expected at least {workers}; "
                "fix: add photographs, mark some as held-out or high quality, or lower the stage's workers"
            )
