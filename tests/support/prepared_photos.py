"""Folders of small photographs, and the data set that `prepare` makes of them, read back."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from linearsr_platform.data.manifest import Manifest
from linearsr_platform.data.prepare import prepare
from linearsr_platform.data.reader import read_images
from linearsr_platform.recipe.data_schema import DataConfig


def photo(seed: int, width: int = 96, height: int = 64) -> Image.Image:
    """Draw a picture of noise, another one for each seed."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def fill(folder: Path, *names: str) -> Path:
    """Save a photograph under each name below a folder and return the folder; seeds count from 0."""
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(seed).save(path)
    return folder


def config(url: object = "", **changes: object) -> DataConfig:
    """Return settings for photographs as small as `photo` draws them, from one source, `mine`."""
    values = {"sources": {"mine": {"url": str(url)}}, "validation_px": 24, "min_side_px": 24}
    return DataConfig.model_validate(values | changes)


def run(data: DataConfig, output: object, *, folder: object = ".", min_shards: int = 1) -> Manifest:
    """Prepare them below `output`, with tables looked for in `folder`."""
    return prepare(data, recipe_folder=str(folder), output_url=str(output), min_shards=min_shards)


def images(manifest: Manifest, output: object, split: str) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
    """Return the pixels of every sample of a split and what is known about it, by key."""
    return {key: (pixels, meta) for key, pixels, meta in read_images(manifest.shard_urls(str(output), split))}


def everything(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
