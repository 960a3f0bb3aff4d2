"""How fast training crops come out of JPEG shards, beside WebDataset with Pillow, on the same images in one run.

    OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 python tests/benchmarks/data/loader.py

Shards: parts of 512 x 512 px of photographs in scikit-image and scikit-learn, JPEG quality 95, 4:2:0. Each side reads, decodes, takes a
random part of 256 x 256 px and makes batches of 32, one part of each picture. WebDataset: `decode("pil")`, float32 in [0, 1] as
torchvision's ToTensor makes it, torch's DataLoader. Ours: `CropReader`, uint8, which is what training takes. In turns; ratios are of
medians. CPU time is that of all processes. The ceiling is decoding alone, of files in memory, in one process.
"""

import argparse
import io
import statistics
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import simplejpeg
import torch
import webdataset
from PIL import Image
from skimage import data as photographs
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

from example_crops import RANDOM_PART_PX, random_part

from linearsr_platform.data.reader import CropReader

SIDE_PX, CROP_PX, BATCH = 512, RANDOM_PART_PX, 32


def sources() -> list[Image.Image]:
    """Return the photographs, enlarged where a side is short."""
    found = [photographs.astronaut(), photographs.coffee(), photographs.chelsea(), photographs.rocket(), *load_sample_images().images]
    images = [Image.fromarray(array) for array in found]
    scales = [max(1.0, 1.15 * SIDE_PX / min(image.size)) for image in images]
    return [
        image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        for image, scale in zip(images, scales, strict=True)
    ]


def write_shards(folder: Path, count: int, shards: int) -> tuple[list[str], list[bytes]]:
    """Write plain WebDataset tars without anything but pictures; returns their paths and all pictures."""
    rng, images, contents, paths = np.random.default_rng(0), sources(), [], []
    for _ in range(count):
        image = images[rng.integers(len(images))]
        left, top = (int(rng.integers(side - SIDE_PX + 1)) for side in image.size)
        buffer = io.BytesIO()
        image.crop((left, top, left + SIDE_PX, top + SIDE_PX)).save(buffer, "JPEG", quality=95, subsampling=2)
        contents.append(buffer.getvalue())
    for shard in range(shards):
        paths.append(str(folder / f"{shard:04d}.tar"))
        with tarfile.open(paths[-1], "w") as tar:
            for number in range(shard, count, shards):
                info = tarfile.TarInfo(f"{number:06d}.jpg")
                info.size = len(contents[number])
                tar.addfile(info, io.BytesIO(contents[number]))
    return paths, contents


def crop_pil(sample: dict[str, object]) -> torch.Tensor:
    """Take a random part as torchvision's RandomCrop and ToTensor do: float32 (3, H, W)."""
    image: Image.Image = sample["jpg"]
    left, top = (int(torch.randint(side - CROP_PX + 1, ())) for side in image.size)
    array = np.array(image.crop((left, top, left + CROP_PX, top + CROP_PX)))
    return torch.from_numpy(array).permute(2, 0, 1).contiguous().to(torch.float32).div(255)


@contextmanager
def theirs(urls: list[str], workers: int) -> Iterator[Iterator[object]]:
    """Read with WebDataset."""
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").map(crop_pil).repeat()
    loader = DataLoader(dataset, batch_size=BATCH, num_workers=workers)
    batches = iter(loader)
    yield batches
    del batches


@contextmanager
def ours(urls: list[str], workers: int) -> Iterator[Iterator[object]]:
    """Read with the platform."""
    reader = CropReader(urls, random_part, batch_size=BATCH, crops_per_image=1, seed=0, workers=workers)
    yield reader
    reader.close()


def cpu_s() -> float:
    """Return the CPU time of this process and its children."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def measure(side: Callable[..., object], urls: list[str], workers: int, batches: int) -> tuple[float, float, float]:
    """Return samples a wall second and a CPU second, and the seconds until the first batch."""
    started = time.perf_counter()
    with side(urls, workers) as stream:
        next(stream)
        first_s = time.perf_counter() - started
        for _ in range(4 + 4 * workers):
            next(stream)
        cpu, wall = cpu_s(), time.perf_counter()
        for _ in range(batches):
            next(stream)
        cpu, wall = cpu_s() - cpu, time.perf_counter() - wall
    return batches * BATCH / wall, batches * BATCH / max(cpu, 1e-9), first_s


def decode_rate(contents: list[bytes]) -> float:
    """Return pictures decoded a CPU second."""
    started = time.process_time()
    for content in contents:
        simplejpeg.decode_jpeg(content, "RGB")
    return len(contents) / (time.process_time() - started)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--images", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        urls, contents = write_shards(Path(folder), options.images, 8)
        print(f"{len(contents)} pictures, {sum(map(len, contents)) / len(contents) / 1000:.0f} kB on average")
        ceiling, found = [], {}
        for _ in range(options.rounds):
            for workers in (0, 1, 2):
                for name, side in (("webdataset", theirs), ("ours", ours)):
                    found.setdefault((name, workers), []).append(measure(side, urls, workers, options.batches))
                    ceiling.append(decode_rate(contents[:300]))
        top = statistics.median(ceiling)
        print(f"decoding alone: {top:.0f} samples/s of CPU")
        for workers in (0, 1, 2):
            rates = {name: [statistics.median(one) for one in zip(*found[name, workers], strict=True)] for name in ("webdataset", "ours")}
            for name, (wall, cpu, first_s) in rates.items():
                share = f"{cpu / top:.2f} of decoding"
                print(f"{workers} workers, {name:10}: {wall:6.0f} /s wall, {cpu:6.0f} /s CPU ({share}), first batch {first_s:.2f} s")
            wall, cpu = (rates["ours"][i] / rates["webdataset"][i] for i in (0, 1))
            print(f"{workers} workers, ratio: {wall:.2f} wall, {cpu:.2f} CPU")


if __name__ == "__main__":
    main()
