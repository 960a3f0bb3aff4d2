"""Read shards back: all images at once, or an endless, resumable stream of batches of training crops."""

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from webdataset.tariterators import group_by_keys, tar_file_expander

from linearsr.tags import Caption
from linearsr_platform import storage
from linearsr_platform.data.images import BadImageError, Pixels, decode_png
from linearsr_platform.errors import StageError, UserError

Transform = Callable[..., dict[str, NDArray[np.generic]]]
"""Makes one training example of an image (H, W, 3), what `caption_of` gives and a source of randomness; where the sample has a latent,
it is the fourth argument."""
TEXTS = ("text", "text_lr")
LATENT = "latent"
ARRAYS = (*TEXTS, LATENT)
"""Arrays that a sample may have; they are read into its `meta`."""

BLOCK_IMAGES = 16
"""Images that are mixed with each other at least, as long as they fit into `BLOCK_BYTES`."""
BLOCK_BYTES = 256 * 2**20
"""Decoded pixels of a block of images."""


@dataclass(frozen=True, slots=True)
class RawSample:
    """A sample as it lies in a shard, not decoded."""

    key: str
    url: str
    """Its shard."""
    png: bytes
    meta: dict[str, object]
    """What `KEY.json` says, and its arrays by name."""

    @property
    def decoded_bytes(self) -> int:
        """Memory of its pixels."""
        return 3 * int(str(self.meta["width_px"])) * int(str(self.meta["height_px"]))

    def decode(self) -> Pixels:
        """Return its pixels (H, W, 3), read-only.

        Raises:
            StageError: if they are broken.
        """
        try:
            return decode_png(self.png)
        except BadImageError as error:
            raise StageError(f"shard {self.url}: sample {self.key}: {error}; fix: run the stage `prepare` again") from error


def caption_of(meta: Mapping[str, object]) -> list[str] | Caption:
    """Return what a sample says in words: its tags, or a `Caption` if it has more than those."""
    tags, tags_lr = (_words(meta.get(name)) for name in ("tags", "tags_lr"))
    if "tags_lr" not in meta and "text" not in meta:
        return tags
    text, text_lr = (value if isinstance(value, np.ndarray) else None for value in (meta.get(name) for name in TEXTS))
    return Caption(
        tags=tags,
        tags_lr=tags_lr if "tags_lr" in meta else None,
        text=text,
        text_lr=text_lr,
        encoder=str(meta.get("text_encoder", "")),
    )


def _words(value: object) -> list[str]:
    return [str(word) for word in value] if isinstance(value, list) else []


def read_shard(url: str) -> Iterator[RawSample]:
    """Read the samples of one shard, local or remote, in their order.

    Raises:
        StageError: if the shard is missing, cut off or not WebDataset; the message names it.
    """
    fs, path = storage.filesystem(url)
    try:
        with fs.open(path, "rb") as stream:
            for raw in group_by_keys(tar_file_expander([{"url": url, "stream": stream}])):
                arrays = {name: np.load(BytesIO(raw[f"{name}.npy"]), allow_pickle=False) for name in ARRAYS if f"{name}.npy" in raw}
                yield RawSample(raw["__key__"], url, raw["png"], json.loads(raw["json"]) | arrays)
    except (OSError, EOFError, tarfile.TarError, ValueError, KeyError) as error:
        raise StageError(f"shard {url}: cannot be read: {type(error).__name__}: {error}; fix: run the stage `prepare` again") from error


def read_images(shard_urls: Sequence[str]) -> list[tuple[str, Pixels, dict[str, object]]]:
    """Read all images of some shards into memory: key, pixels (H, W, 3), what is known about them."""
    return [(sample.key, sample.decode(), sample.meta) for url in shard_urls for sample in read_shard(url)]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a rank's endless stream of samples stands: the next sample to read."""

    epoch: int = 0
    shard: int = 0
    """Position in the rank's own order of shards of this epoch."""
    sample: int = 0


@dataclass(slots=True)
class _Block:
    """Images whose crops are mixed with each other."""

    start: _Place
    end: _Place
    """Place after its last image."""
    images: list[tuple[_Place, RawSample]]
    order: NDArray[np.int64]
    """Numbers of crops in the order they are given out; `crops_per_image` belong to each image."""
    pixels: dict[str, Pixels] = field(default_factory=dict)
    """Images decoded so far, by key: on small data a block holds an image once an epoch."""


class CropReader:
    """An endless iterator of batches of one rank; two readers with the same arguments give the same batches.

    Shards are shuffled anew every epoch and dealt out to the ranks after that, so that ranks never see the same image in one
    epoch and all see all images over time. A rank starts its next epoch when its own shards are read, so none ever runs dry.
    Images are taken in blocks of at least `BLOCK_IMAGES`; the crops of a block come in random order. A crop depends on seed,
    image, epoch and number only, not on ranks.
    """

    def __init__(
        self,
        shard_urls: Sequence[str],
        transform: Transform,
        *,
        batch_size: int,
        crops_per_image: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Stand before the first batch; nothing is read yet.

        Raises:
            UserError: if there are fewer shards than ranks.
        """
        if len(shard_urls) < world_size:
            got = f"training data: got {len(shard_urls)} shards for {world_size} workers"
            raise UserError(f"{got}; expected one each; fix: fewer `workers`, or prepare the data for as many")
        self._shard_urls = tuple(shard_urls)
        self._transform = transform
        self._batch_size = batch_size
        self._crops_per_image = crops_per_image
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._block_images = max(BLOCK_IMAGES, 2 * batch_size)
        self._jump(_Place(), 0)

    def __iter__(self) -> Self:
        """Return itself."""
        return self

    def __next__(self) -> dict[str, Tensor]:
        """Return the next batch: what `transform` makes, stacked to (batch_size, ...)."""
        examples = [self._example() for _ in range(self._batch_size)]
        return {name: torch.from_numpy(np.stack([example[name] for example in examples])) for name in examples[0]}

    def state(self) -> dict[str, int]:
        """Return, JSON-able, where the next batch starts. It belongs to this rank: every rank keeps its own."""
        return {**self._identity(), **asdict(self._start), "offset": self._offset}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from a `state`: the next batches are those that would have come then.

        Raises:
            UserError: if the state is of a reader with other arguments.
        """
        expected = self._identity()
        got = {name: state.get(name) for name in expected}
        if got != expected:
            raise UserError(f"reader state: got {got}; expected {expected}; fix: resume with the same data, seed, workers and rank")
        self._jump(_Place(state["epoch"], state["shard"], state["sample"]), state["offset"])

    def _identity(self) -> dict[str, int]:
        """What a state must agree with."""
        return {
            "seed": self._seed,
            "rank": self._rank,
            "world_size": self._world_size,
            "crops_per_image": self._crops_per_image,
            "block_images": self._block_images,
            "shards": len(self._shard_urls),
        }

    def _jump(self, start: _Place, offset: int) -> None:
        """Stand `offset` crops into the block that starts at `start`."""
        self._start, self._offset = start, offset
        self._stream = self._samples(start)
        self._block: _Block | None = None

    def _example(self) -> dict[str, NDArray[np.generic]]:
        """Return the next crop."""
        block = self._block or self._next_block()
        if self._offset == len(block.order):
            self._start, self._offset = block.end, 0
            block = self._next_block()
        self._block = block
        image, draw = divmod(int(block.order[self._offset]), self._crops_per_image)
        place, sample = block.images[image]
        if sample.key not in block.pixels:
            block.pixels[sample.key] = sample.decode()
        rng = _generator(self._seed, _number(sample.key), place.epoch, draw)
        self._offset += 1
        latent = [sample.meta[LATENT]] if LATENT in sample.meta else []
        return self._transform(block.pixels[sample.key], caption_of(sample.meta), rng, *latent)

    def _next_block(self) -> _Block:
        """Read the block that starts at `_start`."""
        images: list[tuple[_Place, RawSample]] = []
        room_bytes = BLOCK_BYTES
        while len(images) < self._block_images and room_bytes > 0:
            images.append(next(self._stream))
            room_bytes -= images[-1][1].decoded_bytes
        last = images[-1][0]
        start, end = self._start, _Place(last.epoch, last.shard, last.sample + 1)
        rng = _generator(self._seed, self._rank, self._world_size, start.epoch, start.shard, start.sample)
        return _Block(start, end, images, rng.permutation(len(images) * self._crops_per_image))

    def _samples(self, start: _Place) -> Iterator[tuple[_Place, RawSample]]:
        """Read this rank's samples from `start` on, epoch after epoch."""
        while True:
            order = _generator(self._seed, start.epoch).permutation(len(self._shard_urls))[self._rank :: self._world_size]
            seen = start.shard + start.sample
            for shard in range(start.shard, len(order)):
                for number, sample in enumerate(read_shard(self._shard_urls[order[shard]])):
                    seen += 1
                    if number >= start.sample or shard > start.shard:
                        yield _Place(start.epoch, shard, number), sample
            if not seen:
                raise StageError(f"training data: got {len(order)} empty shards, first {self._shard_urls[order[0]]}; expected samples")
            start = _Place(start.epoch + 1)


def _number(text: str) -> int:
    """Return 64 bits of a text's sha256, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _generator(*entropy: int) -> np.random.Generator:
    """Return a generator that depends on the numbers given, in their order; negative ones are taken modulo 2^64."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([number % 2**64 for number in entropy])))
