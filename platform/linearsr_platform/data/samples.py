"""Samples of shards: a picture, what is said about it, and its arrays; read and decoded when they are asked for. Imports no torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from linearsr.pictures import DECODING_ERRORS
from linearsr.tags import Caption
from linearsr_platform import storage
from linearsr_platform.data.images import BadImageError, Pixels, decode_image
from linearsr_platform.data.jpeg import JpegDecoder, JpegHeader, jpeg_header
from linearsr_platform.data.members import read_array, read_object
from linearsr_platform.data.shard_files import Shard, read_entries
from linearsr_platform.data.tar_index import Entry
from linearsr_platform.errors import StageError

TEXTS = ("text", "text_lr")
LATENT = "latent"
ARRAYS = (*TEXTS, LATENT)
"""Arrays that a sample may have; they are read into its `meta`."""
JPEG = ("jpg", "jpeg")
PICTURES = ("png", *JPEG, "webp")
"""Members that are taken for a sample's picture, the first that is there."""


class RawSample:
    """A sample as it lies in a shard, not decoded."""

    __slots__ = ("_entry", "_facts", "_header", "_shard", "number")

    def __init__(self, shard: Shard, number: int) -> None:
        """Stand for the sample `number` of a shard; nothing is read yet."""
        self._shard = shard
        self._entry: Entry = shard.entries[number]
        self._facts: dict[str, object] | None = None
        self._header: JpegHeader | None = None
        self.number = number
        """Position in its shard."""

    @property
    def key(self) -> str:
        """Its name, without a suffix."""
        return self._entry.key

    @property
    def url(self) -> str:
        """Its shard."""
        return self._shard.url

    @property
    def facts(self) -> dict[str, object]:
        """What `KEY.json` says; nothing if there is none.

        Raises:
            StageError: if it is not a JSON object.
        """
        if self._facts is None:
            try:
                self._facts = read_object(self.read("json")) if "json" in self._entry.members else {}
            except ValueError as error:
                raise self.error(f"{self.key}.json: cannot be read: {error}") from error
        return self._facts

    @property
    def meta(self) -> dict[str, object]:
        """What `KEY.json` says, and its arrays by name; made anew at each call.

        Raises:
            StageError: if one of them cannot be read.
        """
        arrays: dict[str, object] = {}
        for name in ARRAYS:
            if f"{name}.npy" in self._entry.members:
                try:
                    arrays[name] = read_array(self.view(f"{name}.npy"))
                except ValueError as error:
                    raise self.error(f"{self.key}.{name}.npy: {error}") from error
        return {**self.facts, **arrays}

    @property
    def decoded_bytes(self) -> int:
        """Memory of its pixels, found without decoding them."""
        width_px, height_px = self.size_px
        return 3 * width_px * height_px

    @property
    def size_px(self) -> tuple[int, int]:
        """Width and height of the part that may be used: what `KEY.json` says, or else the picture's own header.

        Raises:
            StageError: if neither can be read.
        """
        if "width_px" in self.facts and "height_px" in self.facts:
            width_px, height_px = self.facts["width_px"], self.facts["height_px"]
            if isinstance(width_px, int) and isinstance(height_px, int):
                return width_px, height_px
            raise self.error(f"{self.key}.json: got width_px {width_px!r} and height_px {height_px!r}; expected whole numbers")
        name = self.picture_name
        try:
            if name in JPEG:
                self._header = header = jpeg_header(self.view(name))
                return header.width_px, header.height_px
            with Image.open(BytesIO(self.view(name))) as image:
                return image.size
        except (*DECODING_ERRORS, BadImageError) as error:
            raise self.error(str(error)) from error

    @property
    def picture_name(self) -> str:
        """Member that is its picture: `png`, `jpg`, ...

        Raises:
            StageError: if it has none.
        """
        for name in PICTURES:
            if name in self._entry.members:
                return name
        raise self.error(f"got {', '.join(self._entry.members)}; expected one of {', '.join(PICTURES)}")

    def read(self, member: str) -> bytes:
        """Return one member's content as it is in the shard."""
        return bytes(self.view(member))

    def view(self, member: str) -> memoryview:
        """Return one member's content where it lies, uncopied; good as long as somebody has this sample."""
        return self._shard.view(self._entry, member)

    def decode(self, decoder: JpegDecoder) -> Pixels:
        """Return the pixels that may be used, (H, W, 3), read-only: all of them, or those in `box` of `KEY.json`.

        Raises:
            StageError: if they are broken, or fewer than `box` says.
        """
        name = self.picture_name
        try:
            pixels = decoder.decode(self.view(name), self._header) if name in JPEG else decode_image(self.view(name)).pixels
        except BadImageError as error:
            raise self.error(str(error)) from error
        box = self.facts.get("box")
        return pixels if box is None or "width_px" not in self.facts else self._part(pixels, box)

    def open(self, decoder: JpegDecoder) -> "OpenedSample":
        """Decode everything that an example may be made of, read-only.

        Raises:
            StageError: if its picture or its JSON is broken.
        """
        meta = self.meta
        for name in ARRAYS:
            array = meta.get(name)
            if isinstance(array, np.ndarray):
                array.flags.writeable = False
        latent = meta.get(LATENT)
        return OpenedSample(self.decode(decoder), caption_of(meta), latent if isinstance(latent, np.ndarray) else None)

    def error(self, what: str) -> StageError:
        """Return the error that says what is wrong with this sample."""
        return StageError(f"shard {storage.shown(self.url)}: sample {self.key}: {what}; fix: write the shard again, without this sample")

    def _part(self, pixels: Pixels, box: object) -> Pixels:
        """Cut out a box: left, top, right, bottom."""
        height_px, width_px = pixels.shape[:2]
        numbers = [number for number in box if isinstance(number, int)] if isinstance(box, list) else []
        if len(numbers) == 4:
            left, top, right, bottom = numbers
            if 0 <= left < right <= width_px and 0 <= top < bottom <= height_px:
                return pixels[top:bottom, left:right]
        raise self.error(f"box: got {box} in a picture of {width_px} x {height_px} px; expected [left, top, right, bottom] inside it")


@dataclass(frozen=True, slots=True)
class OpenedSample:
    """What examples of a sample are made of; several crops share it, so nobody may change it."""

    pixels: Pixels
    """(H, W, 3)."""
    caption: list[str] | Caption
    latent: NDArray[np.generic] | None


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
        suffix=str(meta.get("text_suffix", "")),
    )


def _words(value: object) -> list[str]:
    return [str(word) for word in value] if isinstance(value, list) else []


def read_shard(url: str) -> Iterator[RawSample]:
    """Read the samples of one shard, local or remote, in their order.

    Raises:
        StageError: if the shard is missing, cut off or not WebDataset; the message names it.
        ShardAwayError: if its store does not answer.
    """
    for number, (shard, _) in enumerate(read_entries(url)):
        yield RawSample(shard, number)


def read_images(shard_urls: Sequence[str], most: int | None = None) -> list[tuple[str, Pixels, dict[str, object]]]:
    """Read the images of some shards into memory: key, pixels (H, W, 3), what is known about them.

    Args:
        shard_urls: are opened as far as they are needed.
        most: how many, from the first on; None is all.
    """
    decoder = JpegDecoder()
    samples = (sample for url in shard_urls for sample in read_shard(url))
    return [(sample.key, sample.decode(decoder), sample.meta) for sample in islice(samples, most)]
