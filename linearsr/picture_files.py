"""Pictures as files: PNG with 8 or 16 bits, JPEG, WebP, with profile, resolution and EXIF. Imports no torch."""

import struct
import zlib
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from linearsr.pictures import Picture, PictureError, luma

OUTPUT_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""What can be written, in lower case."""
INPUT_SUFFIXES = (*OUTPUT_SUFFIXES, ".bmp", ".tif", ".tiff")
"""File names that are taken for pictures, in lower case."""
QUALITY = 95
"""Of JPEG and WebP."""
LARGEST_SIDE_PX = {".jpg": 65500, ".jpeg": 65500, ".webp": 16383}
"""Limits of the libraries that write them: the format JPEG has room for 65535, libjpeg (`JPEG_MAX_DIMENSION`) takes 65500."""
LARGEST_JPEG_EXIF = 65533
"""Bytes that fit into a JPEG's segment."""
INCH_M = 0.0254
PNG_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
"""Channels -> colour type of PNG."""
_Samples = NDArray[np.uint8] | NDArray[np.uint16]


def output_suffix(suffix: str) -> str:
    """Return the suffix that an enlarged picture gets in place of its own: formats that are not written become PNG."""
    return suffix if suffix.lower() in OUTPUT_SUFFIXES else ".png"


def fit_format(picture: Picture, suffix: str) -> Picture:
    """Return the picture as the format can hold it, with a note for what is lost.

    Raises:
        PictureError: if it is too large for the format.
    """
    check_size(picture.size, suffix)
    kind, notes = suffix.lower(), []
    colour, alpha, bits, exif = picture.colour, picture.alpha, picture.bits, picture.exif
    if bits == 16 and kind != ".png":
        bits = 8
        notes.append(f"16 bits reduced to 8: {kind[1:]} holds no more")
    if alpha is not None and kind in (".jpg", ".jpeg"):
        colour, alpha = colour * alpha[..., None] + (1 - alpha[..., None]), None
        notes.append("transparency laid over white: JPEG has none")
    if exif is not None and len(exif) > LARGEST_JPEG_EXIF and kind in (".jpg", ".jpeg"):
        exif = None
        notes.append("EXIF left out: JPEG holds no more than 64 kB of it")
    if picture.dpi is not None and exif is None and kind == ".webp":
        notes.append("resolution left out: WebP has no place for it but EXIF")
    return replace(picture, colour=colour, alpha=alpha, bits=bits, exif=exif, notes=(*picture.notes, *notes))


def check_size(size: tuple[int, int], suffix: str) -> None:
    """Refuse a size (width, height) that the format cannot hold, before anything is enlarged for it.

    Raises:
        PictureError: if a side is too long.
    """
    limit = LARGEST_SIDE_PX.get(suffix.lower())
    if limit is not None and max(size) > limit:
        raise PictureError(f"{suffix}: got {size[0]} x {size[1]} px; expected at most {limit} a side; fix: write PNG")


def encode_picture(picture: Picture, suffix: str) -> bytes:
    """Return the bytes of a file; the same picture gives the same bytes.

    Args:
        picture: as `fit_format` returned it.
        suffix: one of `OUTPUT_SUFFIXES`.
    """
    samples = quantise(picture)
    if picture.bits == 16:
        return _png16(samples, picture)
    image = Image.fromarray(samples[..., 0] if samples.shape[2] == 1 else samples)
    given = {"icc_profile": picture.profile, "exif": picture.exif, "dpi": picture.dpi}
    extra: dict[str, Any] = {name: value for name, value in given.items() if value}
    buffer = BytesIO()
    kind = suffix.lower()
    if kind == ".png":
        # Level 4 takes 0.6 of the time of Pillow's default 6 for the same size.
        image.save(buffer, "PNG", compress_level=4, **extra)
    else:
        image.save(buffer, "WEBP" if kind == ".webp" else "JPEG", quality=QUALITY, **extra)
    return buffer.getvalue()


def quantise(picture: Picture) -> _Samples:
    """Round to the picture's bits: (H, W, C), C being 1 or 3 channels of light and one of alpha if it has it."""
    light = luma(picture.colour)[..., None] if picture.grey else picture.colour
    planes = light if picture.alpha is None else np.concatenate([light, picture.alpha[..., None]], axis=2)
    levels = 65535 if picture.bits == 16 else 255
    rounded = np.rint(planes.clip(0, 1) * levels)
    samples: _Samples = rounded.astype(np.uint16) if picture.bits == 16 else rounded.astype(np.uint8)
    return samples


def _png16(samples: _Samples, picture: Picture) -> bytes:
    """Write a 16-bit PNG, which Pillow does for grey only. Rows are stored as differences to the row above (filter 2)."""
    height, width, channels = samples.shape
    rows = samples.astype(">u2").view(np.uint8).reshape(height, -1)
    differences = np.vstack([rows[:1], rows[1:] - rows[:-1]])
    filtered = np.hstack([np.full((height, 1), 2, dtype=np.uint8), differences])
    header = struct.pack(">IIBBBBB", width, height, 16, PNG_COLOUR_TYPES[channels], 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", _chunk(b"IHDR", header)]
    if picture.profile:
        parts.append(_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(picture.profile)))
    if picture.dpi:
        parts.append(_chunk(b"pHYs", struct.pack(">IIB", *(round(one / INCH_M) for one in picture.dpi), 1)))
    if picture.exif:
        parts.append(_chunk(b"eXIf", picture.exif.removeprefix(b"Exif\0\0")))
    return b"".join([*parts, _chunk(b"IDAT", zlib.compress(filtered.tobytes(), 4)), _chunk(b"IEND", b"")])


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
