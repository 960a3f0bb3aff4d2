"""Crops become examples, and examples one batch, each written to its place at once. Imports no torch."""

import sys
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from linearsr_platform.data.jpeg import JpegDecoder
from linearsr_platform.data.lanes import Crop

Example = Mapping[str, NDArray[np.generic]]
Arrays = dict[str, NDArray[np.generic]]
Transform = Callable[..., dict[str, NDArray[np.generic]]]
"""Makes one training example of an image (H, W, 3), what `caption_of` gives and a source of randomness; where the sample has a latent,
it is the fourth argument. Several crops share these, so it changes none of them."""

ALIGN_BYTES = 64
KEPT_BATCHES = 4
"""Batches whose memory is used again; who holds more of them at once has them made anew."""


class CropMaker:
    """Makes the examples of crops; a sample is opened once for all its crops in a block."""

    def __init__(self, transform: Transform, seed: int) -> None:
        """Make examples with `transform`, whose randomness begins with `seed`."""
        self._transform, self._seed = transform, seed
        self._decoder = JpegDecoder()

    def make(self, crop: Crop) -> dict[str, NDArray[np.generic]]:
        """Return the example of a crop.

        Raises:
            StageError: if its image is broken.
        """
        known = crop.block.opened
        opened = known.pop(crop.image, None) or crop.sample.open(self._decoder)
        if not crop.last:
            known[crop.image] = opened
        latent = () if opened.latent is None else (opened.latent,)
        return self._transform(opened.pixels, opened.caption, crop.generator(self._seed), *latent)


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """Names, types and shapes of the arrays of a batch."""

    batch_size: int
    fields: tuple[tuple[str, str, tuple[int, ...]], ...]
    """Name, numpy type and shape of one example's arrays, in the transform's own order."""

    @classmethod
    def of(cls, example: Example, batch_size: int) -> "BatchLayout":
        """Return the layout of a batch of examples like this one."""
        return cls(batch_size, tuple((name, array.dtype.str, tuple(array.shape)) for name, array in example.items()))

    def allocate(self) -> Arrays:
        """Return new arrays (batch_size, ...) with nothing in them."""
        return {name: np.empty((self.batch_size, *shape), dtype=kind) for name, kind, shape in self.fields}

    @property
    def slot_bytes(self) -> int:
        """Memory of one batch in a shared buffer."""
        return self._offsets()[-1]

    def views(self, buffer: memoryview, slot: int) -> Arrays:
        """Return the arrays of a batch in a shared buffer."""
        found = {}
        for (name, kind, shape), offset in zip(self.fields, self._offsets(), strict=False):
            whole = (self.batch_size, *shape)
            # Not `frombuffer` and `reshape`: parts of what comes out then would refer to what goes in, and nobody could see their use.
            found[name] = np.ndarray(whole, kind, buffer, slot * self.slot_bytes + offset)
        return found

    def _offsets(self) -> Sequence[int]:
        """Return where each array starts in a slot, and where the slot ends."""
        sizes = (int(np.prod((self.batch_size, *shape), dtype=np.int64)) * np.dtype(kind).itemsize for _, kind, shape in self.fields)
        return list(accumulate((-(-size // ALIGN_BYTES) * ALIGN_BYTES for size in sizes), initial=0))


class BatchMemory:
    """Arrays of batches, used again when nobody refers to them any more.

    Memory that is new to a process costs it a page fault every 4 kB: up to 0.25 ms for an example of 192 kB, where decoding its
    picture takes 0.8 ms (`tests/benchmarks/data/loader.md`).
    """

    def __init__(self) -> None:
        """Own nothing yet."""
        self._known: list[Arrays] = []
        self._free = _references({"": np.empty(0)})

    def take(self, layout: BatchLayout) -> Arrays:
        """Return arrays (batch_size, ...) with anything in them, which nobody else has; a tensor made of one is a reference to it."""
        for arrays in self._known:
            if _references(arrays) == self._free:
                return dict(arrays)
        arrays = layout.allocate()
        self._known = [arrays, *self._known[: KEPT_BATCHES - 1]]
        return dict(arrays)


class BatchRing:
    """Batches in a buffer that others fill; they are handed out where they lie."""

    def __init__(self, buffer: memoryview, layout: BatchLayout, slots: int) -> None:
        """Look at a buffer as `slots` batches."""
        self._views = [layout.views(buffer, slot) for slot in range(slots)]
        self._free = _references({"": np.empty(0)})

    def batch(self, slot: int) -> Arrays:
        """Return the arrays of a slot; as long as somebody refers to one of them the slot is not free."""
        return dict(self._views[slot])

    def free(self, taken: Container[int]) -> int | None:
        """Return a slot that is not among those `taken` and that nobody refers to; None if there is none."""
        slots = (slot for slot, arrays in enumerate(self._views) if slot not in taken and _references(arrays) == self._free)
        return next(slots, None)


def _references(arrays: Arrays) -> int:
    """Return how often the most referred-to array is referred to; how many is none depends on the interpreter."""
    return max(sys.getrefcount(array) for array in arrays.values())


def place(arrays: Arrays, position: int, example: Example, crop: Crop) -> None:
    """Write an example into its place of a batch.

    Raises:
        StageError: if it is not like the others; the message names the sample.
    """
    if example.keys() != arrays.keys():
        raise crop.sample.error(f"got an example of {', '.join(example)}; expected {', '.join(arrays)} as of other samples")
    for name, array in example.items():
        target = arrays[name]
        if array.shape != target.shape[1:] or array.dtype != target.dtype:
            got = f"got {name} as {array.dtype} {array.shape}"
            raise crop.sample.error(f"{got}; expected {target.dtype} {target.shape[1:]} as of other samples")
        target[position] = array
