"""The order of crops: which crop of which image comes when, for any number of workers. Imports no torch.

A run's data flow in *lanes*, as many as it was started with workers. A lane is an endless stream: every epoch the shards are shuffled
anew and dealt out to the lanes, so lanes share no image within an epoch and each sees all images over time; a lane starts its next
epoch when its own shards are read, so none ever runs dry. Images are taken in blocks, and the crops of a block come in random order.
A crop depends on seed, image, epoch and number only.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from linearsr_platform.data.samples import OpenedSample, RawSample
from linearsr_platform.data.shard_files import ShardFiles
from linearsr_platform.errors import StageError, UserError

BLOCK_IMAGES = 16
"""Images that are mixed with each other at least, as long as they fit into `BLOCK_BYTES`."""
BLOCK_BYTES = 256 * 2**20
"""Decoded pixels of a block of images."""


@dataclass(frozen=True, slots=True)
class Lanes:
    """How a run's data are dealt out, from its first step to its last."""

    count: int
    """Workers that the run was started with."""
    batch_size: int
    """Crops of one micro-batch of one of them."""


def lanes_of(states: Sequence[Mapping[str, object]]) -> Lanes:
    """Return the lanes of the run whose workers wrote some reader states; a reader for another number of workers needs them.

    Raises:
        UserError: if there is no state, or it is of a release without lanes.
    """
    try:
        return Lanes(int(str(states[0]["lane_count"])), int(str(states[0]["lane_batch"])))
    except (IndexError, KeyError) as error:
        raise UserError("reader state: got none with `lane_count`; expected one; fix: train again from the start") from error


@dataclass(frozen=True, kw_only=True)
class CropPlan:
    """Everything that decides which crops come in which order."""

    shard_urls: tuple[str, ...]
    lanes: Lanes
    crops_per_image: int
    seed: int

    def __post_init__(self) -> None:
        """Refuse lanes without a shard.

        Raises:
            UserError: if there are fewer shards than lanes.
        """
        if len(self.shard_urls) < self.lanes.count:
            got = f"training data: got {len(self.shard_urls)} shards for {self.lanes.count} workers"
            raise UserError(f"{got}; expected one each; fix: fewer `workers`, or prepare the data for as many")

    @property
    def block_images(self) -> int:
        """Images of a block."""
        return max(BLOCK_IMAGES, 2 * self.lanes.batch_size)

    def identity(self) -> dict[str, int]:
        """Return what a state must agree with; JSON-able."""
        return {
            "seed": self.seed,
            "lane_count": self.lanes.count,
            "lane_batch": self.lanes.batch_size,
            "crops_per_image": self.crops_per_image,
            "block_images": self.block_images,
            "shards": len(self.shard_urls),
        }

    def shard_order(self, lane: int, epoch: int) -> NDArray[np.int64]:
        """Return the numbers of a lane's shards in the order of an epoch."""
        return generator(self.seed, epoch).permutation(len(self.shard_urls))[lane :: self.lanes.count]


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a lane stands: the block that starts at this sample, and how many of its crops are behind."""

    epoch: int = 0
    shard: int = 0
    """Position in the lane's own order of shards of this epoch."""
    sample: int = 0
    offset: int = 0


@dataclass(slots=True)
class Block:
    """Images whose crops are mixed with each other."""

    images: list[tuple[int, RawSample]]
    """Epoch and sample."""
    order: list[int]
    """Numbers of crops in the order they are given out; `crops_per_image` belong to each image."""
    end: Cursor
    """Where the next block starts."""
    ahead: Counter[tuple[str, int]]
    """Crops still to come, by image; on small data a block holds an image once an epoch."""
    opened: dict[tuple[str, int], OpenedSample] = field(default_factory=dict)
    """Images decoded so far that are still needed."""


@dataclass(frozen=True, slots=True)
class Crop:
    """One crop to be made."""

    sample: RawSample
    epoch: int
    draw: int
    """Number among the crops of its image in this epoch."""
    block: Block
    last: bool
    """Whether no other crop of its image follows in its block."""

    @property
    def image(self) -> tuple[str, int]:
        """What tells its image from all others: shard and position."""
        return self.sample.url, self.sample.number

    def generator(self, seed: int) -> np.random.Generator:
        """Return its source of randomness."""
        return generator(seed, _number(self.sample.key), self.epoch, self.draw)


class Lane:
    """One endless stream of crops."""

    def __init__(self, plan: CropPlan, number: int, files: ShardFiles) -> None:
        """Stand at the very beginning; nothing is read yet."""
        self._plan, self._number, self._files = plan, number, files
        self.jump(Cursor())

    def jump(self, cursor: Cursor) -> None:
        """Go to a place that `cursor` gave."""
        self._start, self._offset = cursor, cursor.offset
        self._samples = self._read(cursor)
        self._block: Block | None = None

    def cursor(self) -> Cursor:
        """Return where the lane stands."""
        return Cursor(self._start.epoch, self._start.shard, self._start.sample, self._offset)

    def take(self, count: int) -> list[Crop]:
        """Return the next crops; none is decoded."""
        return [self._next() for _ in range(count)]

    def skip(self, count: int) -> None:
        """Leave out the next crops; no picture of theirs is read."""
        for _ in range(count):
            crop = self._next()
            if crop.last:
                crop.block.opened.pop(crop.image, None)

    def _next(self) -> Crop:
        block = self._block or self._next_block()
        if self._offset == len(block.order):
            self._start, self._offset = block.end, 0
            block = self._next_block()
        self._block = block
        image, draw = divmod(block.order[self._offset], self._plan.crops_per_image)
        epoch, sample = block.images[image]
        self._offset += 1
        key = (sample.url, sample.number)
        block.ahead[key] -= 1
        return Crop(sample, epoch, draw, block, block.ahead[key] == 0)

    def _next_block(self) -> Block:
        """Read the block that starts at `_start`."""
        found: list[tuple[Cursor, RawSample]] = []
        room_bytes = BLOCK_BYTES
        while len(found) < self._plan.block_images and room_bytes > 0:
            found.append(next(self._samples))
            room_bytes -= found[-1][1].decoded_bytes
        last, start, crops = found[-1][0], self._start, self._plan.crops_per_image
        rng = generator(self._plan.seed, self._number, self._plan.lanes.count, start.epoch, start.shard, start.sample)
        order = rng.permutation(len(found) * crops).tolist()
        images = [(place.epoch, sample) for place, sample in found]
        ahead: Counter[tuple[str, int]] = Counter()
        for _, sample in images:
            ahead[sample.url, sample.number] += crops
        block = Block(images, order, Cursor(last.epoch, last.shard, last.sample + 1), ahead)
        # A restored lane stands inside a block.
        for crop in order[: self._offset]:
            _, sample = images[crop // crops]
            ahead[sample.url, sample.number] -= 1
        return block

    def _read(self, start: Cursor) -> Iterator[tuple[Cursor, RawSample]]:
        """Read this lane's samples from `start` on, epoch after epoch."""
        while True:
            order = self._plan.shard_order(self._number, start.epoch)
            seen = start.shard + start.sample
            for position in range(start.shard, len(order)):
                shard = self._files.open(self._plan.shard_urls[order[position]])
                self._files.prefetch(self._after(start.epoch, position, order))
                first = start.sample if position == start.shard else 0
                for number in range(first, len(shard.entries)):
                    seen += 1
                    yield Cursor(start.epoch, position, number), RawSample(shard, number)
                del shard
            if not seen:
                raise StageError(f"training data: got {len(order)} empty shards, first {self._plan.shard_urls[order[0]]}; expected samples")
            start = Cursor(start.epoch + 1)

    def _after(self, epoch: int, position: int, order: NDArray[np.int64]) -> str:
        """Return the shard that will be needed after one."""
        if position + 1 < len(order):
            return self._plan.shard_urls[int(order[position + 1])]
        return self._plan.shard_urls[int(self._plan.shard_order(self._number, epoch + 1)[0])]


def cursor_state(cursor: Cursor) -> dict[str, int]:
    """Return a cursor as JSON."""
    return asdict(cursor)


def _number(text: str) -> int:
    """Return 64 bits of a text's sha256, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def generator(*entropy: int) -> np.random.Generator:
    """Return a generator that depends on the numbers given, in their order; negative ones are taken modulo 2^64."""
    # A list of numbers would give the same one: numpy cuts it into these words too, but takes three times as long.
    words: list[int] = []
    for number in entropy:
        low, high = number & 0xFFFFFFFF, number >> 32 & 0xFFFFFFFF
        words += [low, high] if high else [low]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(np.array(words, np.uint32))))
