"""JPEG files to uint8 RGB pixels, by libjpeg-turbo through `simplejpeg` if it is installed, and through Pillow if not. Imports no torch.

Both give the same pixels (`tests/unit/test_jpeg.py`): both use the accurate DCT and smooth upsampling of chroma. simplejpeg needs two
thirds of Pillow's time, because it writes straight into the array.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from linearsr_platform.data.images import BadImageError, decode_image

Pixels = NDArray[np.uint8]

FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers that begin a frame, with the size of the picture. Source: ITU-T T.81, table B.1."""
SCAN, EXIF = 0xDA, 0xE1


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """What stands before the first scan of a JPEG."""

    width_px: int
    """As stored, before any rotation that the Exif data ask for."""
    height_px: int
    components: int
    """1 is grey, 3 is colour, 4 is print."""
    bits: int
    exif: bool
    """Whether there are Exif data, which may ask for a rotation."""


def jpeg_header(content: bytes | memoryview) -> JpegHeader:
    """Read size and kind of a JPEG without decoding it.

    Raises:
        BadImageError: if there is no frame in it.
    """
    position, exif = 2, False
    while content[:2] == b"\xff\xd8" and position + 9 < len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xFF:  # padding
            position += 1
            continue
        if marker in FRAMES:
            height_px, width_px = (int.from_bytes(content[position + at : position + at + 2], "big") for at in (5, 7))
            return JpegHeader(width_px, height_px, content[position + 9], content[position + 4], exif)
        if marker == SCAN:
            break
        exif = exif or (marker == EXIF and content[position + 4 : position + 10] == b"Exif\0\0")
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    raise BadImageError("cannot be decoded: it is no JPEG, or cut off before its size")


class JpegDecoder:
    """Decodes JPEG files, the same way for its whole life."""

    def __init__(self, *, fast: bool = True) -> None:
        """Look for simplejpeg, unless `fast` is off."""
        self._simple: Any = None
        if fast:
            try:
                self._simple = import_module("simplejpeg")
            except ModuleNotFoundError:
                self._simple = None

    @property
    def name(self) -> str:
        """Who decodes: `simplejpeg` or `pillow`."""
        return "pillow" if self._simple is None else "simplejpeg"

    def decode(self, content: bytes | memoryview, header: JpegHeader | None = None) -> Pixels:
        """Decode to upright, read-only pixels (H, W, 3).

        Args:
            content: the bytes of the file.
            header: theirs, if it is known already.

        Raises:
            BadImageError: if the file is broken or cut off.
        """
        try:
            header = header or jpeg_header(content)
        except BadImageError:
            # Pillow steps over stray bytes between the markers, as cameras leave some; what it takes, `prepare` has stored.
            return decode_image(content).pixels
        # Pillow knows what a rotation is, and what to do with CMYK.
        if self._simple is None or header.exif or header.components not in (1, 3) or header.bits != 8:
            return decode_image(content).pixels
        try:
            pixels: Pixels = self._simple.decode_jpeg(content, "RGB")
        except ValueError:
            # It is strict about harmless flaws; Pillow decides what is one, so that both refuse the same files.
            return decode_image(content).pixels
        pixels.flags.writeable = False
        return pixels
