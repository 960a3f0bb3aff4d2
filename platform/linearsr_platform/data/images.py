"""Image files to uint8 RGB pixels and back: orientation, depth, palettes, alpha. Imports no torch.

Colour profiles are left as they are: pixels are taken for sRGB. Of an animation or a stack of pages the first one is taken.
"""

import warnings
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from linearsr.pictures import DECODING_ERRORS, check_planes, check_sums, deep_grey, keyed_alpha, reduce_key, why_undecoded

Pixels = NDArray[np.uint8]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""File names that are taken for images, in lower case."""
LOSSLESS_FORMATS = ("PNG", "BMP", "TIFF")
"""Pillow's names of formats whose pixels are taken to be free of compression artefacts."""
ORIENTATION = 0x0112
"""EXIF tag that says how a picture is turned; 1 is upright."""


class BadImageError(Exception):
    """A file that cannot be used as a photograph; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """A photograph in memory."""

    pixels: Pixels
    """(H, W, 3) RGB."""
    lossless: bool
    """Whether the file's format keeps pixels exactly."""
    verbatim: bool = False
    """Whether the file is a JPEG that decodes to these very pixels, without rotation, halving or a change of colours."""


def decode_image(content: bytes | memoryview, *, halve_jpeg: bool = False) -> Decoded:
    """Decode an image file to upright 8-bit RGB; what is transparent becomes white.

    Args:
        content: the bytes of the file.
        halve_jpeg: halve JPEG files by Lanczos, which takes most of their 8 px blocks away.

    Raises:
        BadImageError: if the file is cut off, not an image, decodes to a suspicious size or has no 8-bit meaning.
    """
    if not content:
        raise BadImageError("the file is empty")
    # What the decoders warn about either fails below or does not change the pixels.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(BytesIO(content)) as image:
                kind, mode = image.format or "", image.mode
                rgb = to_rgb(image)
                if kind == "PNG":
                    check_sums(content)
                # Not before: asked for EXIF, a PNG is decoded and forgets how deep it was.
                upright = image.getexif().get(ORIENTATION, 1) == 1
        except DECODING_ERRORS as error:
            raise BadImageError(why_undecoded(error, "an image")) from error
    if halve_jpeg and kind in ("JPEG", "MPO"):
        rgb = halve(rgb)
    verbatim = kind == "JPEG" and mode in ("L", "RGB") and upright and not halve_jpeg
    return Decoded(np.asarray(rgb), lossless=kind in LOSSLESS_FORMATS, verbatim=verbatim)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an opened image of any mode to upright RGB: 16-bit grey is scaled, not clipped; transparency is laid over white.

    Raises:
        ValueError: for 32-bit integer and floating-point images, whose white is not defined.
    """
    check_planes(image)
    # 16-bit RGB Pillow reduces to 8 bits itself, by the high byte, but not its colour key.
    reduce_key(image)
    if (light := deep_grey(image)) is not None:
        alpha = keyed_alpha(image, light)
        light = light if alpha is None else light * alpha + (1 - alpha)
        return Image.fromarray(np.rint(light * 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit samples (mode {image.mode}) have no defined white; convert the file to 8 or 16 bits")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def halve(image: Image.Image) -> Image.Image:
    """Halve both sides by Lanczos; an odd last row or column is cut off so that the factor is exactly 2.

    Raises:
        BadImageError: if a side is a single pixel.
    """
    width, height = image.width // 2, image.height // 2
    if not width or not height:
        raise BadImageError(f"{image.width}x{image.height} px is too small to halve")
    return image.resize((width, height), Image.Resampling.LANCZOS, box=(0, 0, 2 * width, 2 * height))


def encode_png(pixels: Pixels) -> bytes:
    """Encode (H, W, 3) pixels as PNG, without loss and without metadata; the same pixels give the same bytes."""
    buffer = BytesIO()
    # Level 4 takes 0.6 of the time of Pillow's default 6 for the same size.
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def decode_png(content: bytes) -> Pixels:
    """Decode a PNG that `encode_png` wrote to read-only (H, W, 3) pixels.

    Raises:
        BadImageError: if it is not such a file.
    """
    try:
        with Image.open(BytesIO(content), formats=("PNG",)) as image:
            return np.asarray(image.convert("RGB"))
    except DECODING_ERRORS as error:
        raise BadImageError(why_undecoded(error, "an image")) from error


def decode_stored(content: bytes, box: tuple[int, int, int, int] | None = None) -> Pixels:
    """Decode a picture of a shard, PNG or JPEG, to read-only (H, W, 3) pixels.

    Args:
        content: the bytes of the file.
        box: left, top, right, bottom of the part that may be used; None is all of it.

    Raises:
        BadImageError: if it is neither, is broken, or the box reaches outside.
    """
    try:
        with Image.open(BytesIO(content), formats=("PNG", "JPEG")) as image:
            pixels = np.asarray(image.convert("RGB"))
    except DECODING_ERRORS as error:
        raise BadImageError(why_undecoded(error, "an image")) from error
    if box is None:
        return pixels
    left, top, right, bottom = box
    if not (0 <= left < right <= pixels.shape[1] and 0 <= top < bottom <= pixels.shape[0]):
        raise BadImageError(f"box {list(box)} does not lie inside {pixels.shape[1]}x{pixels.shape[0]} px")
    return pixels[top:bottom, left:right]


def sharpness(pixels: Pixels) -> float:
    """Measure focus: the variance of the 4-neighbour Laplacian of luminance, in squared 8-bit levels.

    Source: Pech-Pacheco et al., Diatom autofocusing in brightfield microscopy, ICPR 2000 (LAP4 with BT.601 luminance).
    """
    luma = np.asarray(Image.fromarray(pixels).convert("L")).astype(np.int32)
    if min(luma.shape) < 3:
        return 0.0
    centre = luma[1:-1, 1:-1]
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * centre
    return float(laplacian.var())
