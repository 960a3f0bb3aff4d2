"""Trains the quickstart's network far past its knee in one process, and writes every validation down.

The platform's own data, task, engine and loop do the work, without Ray. A setting says how much the network may see: all that it sees in
the quickstart, or a few fixed crops that it learns by heart.
"""

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_RANK", "0")

from linearsr.config import AugmentationConfig, LatentStatistics, ModelConfig, TagsConfig
from linearsr.degradation import augment, degrade
from linearsr.statistics import measure_statistics
from linearsr.task import SuperResolutionTask, to_pixels
from linearsr.task_config import TaskConfig
from linearsr_platform.data.manifest import load_manifest
from linearsr_platform.data.prepare import prepare
from linearsr_platform.data.reader import CropReader, read_images
from linearsr_platform.recipe.data_schema import DataConfig, SourceConfig
from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.recipe.schema import Recipe
from linearsr_platform.recipe.train_schema import TrainConfig, ValidationConfig
from linearsr_platform.train.engine import DeepSpeedEngine
from linearsr_platform.train.job import TrainJob
from linearsr_platform.train.loop import OUTCOME_FILE, SNAPSHOT_FOLDER, run_training

Batch = dict[str, torch.Tensor]

METRICS = ("psnr_y", "ssim_y", "gmsd", "fsim")
UNSEEN_TABLE = "real_unseen.csv"
STATISTICS_CROPS = 96
PLAIN = AugmentationConfig(flips=False, scales=(1.0, 1.0), colour=False)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run may see, and what of the recipe's `pretrain` it changes."""

    name: str
    split: str = "train"
    """Photographs it trains on: `train`, `high-quality` or `unseen`."""
    crops: int | None = None
    """Fixed crops a photograph, cut and degraded once; None draws new ones for ever."""
    augmentation: AugmentationConfig | None = None
    """None takes the recipe's."""
    tag_dropout: float | None = None
    watch: tuple[str, ...] = ("strips", "photographs")
    """Sets of validation crops that curves are written for, of `Data.images`."""
    raw: bool = True
    """Whether curves of the weights themselves are written beside those of their average."""
    train: Mapping[str, object]
    """Of `TrainConfig`."""


@dataclass(frozen=True)
class Data:
    """The photographs, and what all settings share."""

    recipe: Recipe
    shards: dict[str, tuple[str, ...]]
    """Shards of each split."""
    images: dict[str, list]
    """Images that validation crops come from: `strips` cut off the training photographs, the held-out `photographs`, and strips of
    the `unseen` ones."""
    vocabulary: tuple[str, ...]
    statistics: LatentStatistics

    def task(self, setting: Setting, train: TrainConfig, seed: int) -> SuperResolutionTask:
        """Build the task of a setting."""
        return SuperResolutionTask(
            TaskConfig(
                model=_model(self.recipe, self.vocabulary, setting.tag_dropout),
                statistics=self.statistics,
                interval=(0.0, 1.0),
                degradation=self.recipe.degradation,
                augmentation=setting.augmentation or self.recipe.augmentation,
                crop_px=train.crop_px,
                validation_steps=self.recipe.validation.steps,
                metrics=METRICS,
                seed=seed,
            )
        )


def load_data(recipe_file: Path, folder: Path) -> Data:
    """Write the shards below `folder` unless they are there, and measure the latents as the stage `pretrain` does."""
    loaded = load_recipe(str(recipe_file), overrides=["data.samples_per_shard=1"])
    recipe = loaded.recipe
    unseen = DataConfig(samples_per_shard=1, sources={"skimage": SourceConfig(url="package://skimage/data", table=UNSEEN_TABLE)})
    quickstart = _shards(recipe.data, loaded.folder, folder / "shards")
    other = _shards(unseen, str(Path(__file__).parent), folder / "unseen")
    rng = np.random.default_rng([recipe.seed, STATISTICS_CROPS])
    images = [image for _, image, _ in read_images(quickstart["train"])]
    crops = [augment(images[i % len(images)], recipe.pretrain.crop_px, recipe.augmentation, rng) for i in range(STATISTICS_CROPS)]
    degraded = [degrade(crop, recipe.model.scale, recipe.degradation, rng) for crop in crops]
    hr, lr = (to_pixels(torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2)) for part in (crops, degraded))
    vocabulary = load_manifest(str(folder / "shards")).vocabulary
    return Data(
        recipe=recipe,
        shards={"train": quickstart["train"], "high-quality": quickstart["high-quality"], "unseen": other["train"]},
        images={
            "strips": read_images(quickstart["validation"]),
            "photographs": read_images(quickstart["held-out"]),
            "unseen": read_images(other["validation"]),
        },
        vocabulary=vocabulary,
        statistics=measure_statistics(_model(recipe, vocabulary, None), hr, lr),
    )


def _shards(config: DataConfig, table_folder: str, folder: Path) -> dict[str, tuple[str, ...]]:
    """Return the shards of each split, written now if there is no manifest."""
    if not (folder / "manifest.json").exists():
        prepare(config, recipe_folder=table_folder, output_url=str(folder))
    manifest = load_manifest(str(folder))
    return {split: manifest.shard_urls(str(folder), split) for split, info in manifest.splits.items() if info.samples}


def _model(recipe: Recipe, vocabulary: tuple[str, ...], tag_dropout: float | None) -> ModelConfig:
    model = recipe.model
    dropout = model.tag_dropout if tag_dropout is None else tag_dropout
    return ModelConfig(
        scale=model.scale,
        codec=model.codec,
        backbone=model.resolved_backbone,
        flow=model.flow,
        prior=model.prior,
        tags=TagsConfig(vocabulary=vocabulary, max_tags=model.max_tags, dropout=dropout),
    )


def fixed_batches(task: SuperResolutionTask, images: Sequence, config: ValidationConfig) -> list[Batch]:
    """Cut the recipe's number of validation crops, dealt out over the images in turn; the same at every call."""
    examples = []
    for index in range(config.crops):
        _, image, meta = images[index % len(images)]
        examples.append(task.validation_example(image, meta["tags"], config.crop_px, index))
    chunks = [examples[start : start + config.batch_size] for start in range(0, config.crops, config.batch_size)]
    return [{name: torch.from_numpy(np.stack([one[name] for one in chunk])) for name in chunk[0]} for chunk in chunks]


class Probe:
    """Measures weights on sets of validation crops: the platform's metrics, and the training loss at fixed times and noise."""

    def __init__(self, data: Data, sets: Sequence[str]) -> None:
        # Seed 0 whatever the run's: the same crops and noise, so that curves of different seeds can be compared.
        self.task = data.task(Setting(name="probe", tag_dropout=0.0, train={}), data.recipe.pretrain, seed=0)
        self.network = self.task.build()
        self.batches = {name: fixed_batches(self.task, data.images[name], data.recipe.validation) for name in ("strips", *sets)}

    @torch.no_grad()
    def measure(self, weights: Mapping[str, torch.Tensor], which: str) -> dict[str, float]:
        """Return the mean of each metric over the crops of one set, and `val_loss`."""
        self.network.load_state_dict(weights)
        self.network.eval()
        values: dict[str, list[float]] = {name: [] for name in METRICS}
        losses = []
        generator = torch.Generator().manual_seed(0)
        for batch in self.batches[which]:
            for name, value in self.task.validate(self.network, batch).items():
                values[name] += value.tolist()
            losses.append(float(self.task.loss(self.network, batch, generator)[0]))
        return {**{name: float(np.mean(value)) for name, value in values.items()}, "val_loss": float(np.mean(losses))}


class CurveWriter:
    """An observer that measures the weights at every validation, keeps them, and writes the curves as it goes."""

    def __init__(self, folder: Path, engine: DeepSpeedEngine, probe: Probe, setting: Setting) -> None:
        self.folder, self.engine, self.probe, self.setting = folder, engine, probe, setting
        self.rows: dict[str, list[dict[str, float]]] = {}
        self.losses: list[dict[str, float]] = []

    def on_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the training loss and the gradient."""
        self.losses.append({"step": step, "loss": values["loss"], "grad_norm": values["grad_norm"]})

    def on_validation(self, step: int, values: Mapping[str, float], decision: object) -> None:
        """Measure averaged weights, and raw ones if wanted, on the sets that are watched."""
        name = f"step_{step:08d}.safetensors"
        files = {"ema": self.folder / SNAPSHOT_FOLDER / name}
        if self.setting.raw:
            files["raw"] = self.folder / "raw" / name
            files["raw"].parent.mkdir(exist_ok=True)
            save_file(self.engine.full_weights(), files["raw"])
        for kind, file in files.items():
            weights = load_file(file)
            for which in self.setting.watch:
                rows = self.rows.setdefault(f"{kind}-{which}", [])
                rows.append({"step": step, **self.probe.measure(weights, which)})
                write_curve(self.folder / f"{kind}-{which}.csv", rows)
        write_curve(self.folder / "training.csv", self.losses)

    def on_trip(self, step: int, trip: object) -> None:
        """Forget what was measured after the step that training goes back to."""
        self.rows = {name: [row for row in rows if row["step"] <= step] for name, rows in self.rows.items()}

    def on_start(self, step: int) -> None:
        """Nothing to note."""

    def on_checkpoint(self, step: int) -> None:
        """Nothing to note: there are none, a run that is cut off starts anew."""

    def on_message(self, step: int, text: str) -> None:
        """Nothing to note."""


def write_curve(file: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write rows as CSV under a header line."""
    if not rows:
        return
    temporary = file.with_suffix(".part")
    with temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows([int(row["step"]), *(f"{value:.6g}" for name, value in row.items() if name != "step")] for row in rows)
    temporary.replace(file)


def read_curve(file: Path) -> list[dict[str, float]]:
    """Read what `write_curve` wrote."""
    with file.open(newline="", encoding="utf-8") as stream:
        return [{name: int(text) if name == "step" else float(text) for name, text in row.items()} for row in csv.DictReader(stream)]


def train(data: Data, setting: Setting, seed: int, folder: Path, *, init_weights: Path | None = None) -> None:
    """Run the platform's loop to its last step and leave the curves in `folder`; a finished run is left as it is."""
    if (folder / OUTCOME_FILE).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    base = data.recipe.finetune.train if init_weights else data.recipe.pretrain
    knee = base.knee.model_copy(update={"stop": False, "keep": 10**6})
    fixed = {"workers": 1, "max_seconds": None, "checkpoint_every": 10**9, "log_every": 50, "knee": knee}
    config = base.model_copy(update={**fixed, **setting.train})
    task = data.task(setting, config, seed)
    transform = task.transform if setting.crops is None else _fixed_crops(task, setting.crops, seed)
    batches = CropReader(
        data.shards[setting.split], transform, batch_size=config.batch_size, crops_per_image=config.crops_per_image, seed=seed
    )
    probe = Probe(data, setting.watch)
    job = TrainJob(
        name=setting.name,
        task="linearsr.task:SuperResolutionTask",
        task_config=task.config,
        train=config,
        validation=data.recipe.validation,
        train_shards=data.shards[setting.split],
        validation_shards=(),
        output_url=str(folder),
        seed=seed,
    )
    engine = DeepSpeedEngine(task, config, seed=seed, init_weights=None if init_weights is None else str(init_weights))
    run_training(engine, batches, probe.batches["strips"], job, CurveWriter(folder, engine, probe, setting))
    engine.close()


def _fixed_crops(task: SuperResolutionTask, crops: int, seed: int):
    """Return a transform that knows only `crops` crops of an image, each with one degradation."""
    known: dict[tuple[tuple[str, ...], int], dict] = {}

    def transform(image, tags, rng):
        key = (tuple(tags), int(rng.integers(crops)))
        if key not in known:
            known[key] = task.transform(image, tags, np.random.default_rng([seed, crops, key[1]]))
        return known[key]

    return transform
