"""Shards whose pixels say which image they are, and transforms that other processes can import."""

import os
import signal
from pathlib import Path

import numpy as np

from linearsr_platform.data.shards import Sample, write_shard

RANDOM_PART_PX = 256


def write_numbered(folder: Path, *, shards: int, per_shard: int) -> list[str]:
    """Write shards of `per_shard` images and more (every other shard has one more); every pixel of an image is its number."""
    number = 0
    for shard in range(shards):
        count = per_shard + shard % 2
        samples = [Sample(f"image-{i}", np.full((16, 20, 3), i, np.uint8), {"tags": [f"tag-{i}"]}) for i in range(number, number + count)]
        write_shard(str(folder), f"{shard:05d}.tar", samples)
        number += count
    return [str(path) for path in sorted(folder.iterdir())]


def numbered_crop(image: np.ndarray, tags: list[str], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return a crop and a number that only its randomness decides."""
    assert tags == [f"tag-{image[0, 0, 0]}"]
    top = rng.integers(0, 12)
    return {"image": image[top : top + 4, :4].transpose(2, 0, 1), "draw": np.array(rng.integers(2**62))}


def failing_crop(image: np.ndarray, tags: list[str], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Fail on one image."""
    if image[0, 0, 0] == 7:
        raise ZeroDivisionError("seven")
    return numbered_crop(image, tags, rng)


def disconnected_crop(image: np.ndarray, tags: list[str], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Lose a connection on one image."""
    if image[0, 0, 0] == 7:
        raise ConnectionResetError("the line is dead")
    return numbered_crop(image, tags, rng)


def killing_crop(image: np.ndarray, tags: list[str], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Kill its own process on one image, as the kernel does when memory is short."""
    if image[0, 0, 0] == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return numbered_crop(image, tags, rng)


def random_part(image: np.ndarray, tags: object, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Take a random part as training takes it: uint8 (3, H, W)."""
    top, left = (int(rng.integers(side - RANDOM_PART_PX + 1)) for side in image.shape[:2])
    return {"hr": image[top : top + RANDOM_PART_PX, left : left + RANDOM_PART_PX].transpose(2, 0, 1)}
