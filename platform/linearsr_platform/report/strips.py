"""Pictures of held-out photographs: the same place in every version, side by side.

Versions of one photograph may differ in size (LR is smaller); all are shown at the size of the last one, the reference,
by repeating pixels, so that nothing is smoothed.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Box = tuple[int, int, int, int]
"""left, upper, right, lower, in pixels."""

DETAIL_PX = 112
"""Side of the detail crop, in pixels of the reference."""
ALIGNMENT_PX = 8
"""Detail crops start on multiples of this, so that a crop never cuts an LR pixel at scales up to 8."""
EMBEDDED_PX = 1200
"""Longest side of a whole picture inside the page."""
PAPER = (255, 255, 255)
INK = (28, 30, 33)
FRAME = (230, 57, 70)


@dataclass(frozen=True, kw_only=True)
class PhotoStrip:
    """One photograph in several versions."""

    name: str
    images: dict[str, Image.Image]
    """Label -> RGB picture, in the order shown: LR, bicubic, one-step, routed, original. The last one is the reference."""


def at_reference_size(images: Mapping[str, Image.Image]) -> dict[str, Image.Image]:
    """Return every version in RGB at the size of the last, enlarged by repeating pixels.

    Raises:
        ValueError: if there is no picture.
    """
    if not images:
        raise ValueError("pictures: got no version of the photograph; expected at least one")
    size = list(images.values())[-1].size
    converted = {label: image.convert("RGB") for label, image in images.items()}
    return {label: image if image.size == size else image.resize(size, Image.Resampling.NEAREST) for label, image in converted.items()}


def detail_box(reference: Image.Image, side_px: int = DETAIL_PX) -> Box:
    """Return the square window with the most detail: the largest sum of luminance gradients.

    The same picture always gives the same window; of equals, the first from the top left. A picture smaller than the
    window gives all of itself.
    """
    luminance = np.asarray(reference.convert("L"), dtype=np.float64)
    height, width = luminance.shape
    tall, wide = min(side_px, height), min(side_px, width)
    gradients = np.zeros_like(luminance)
    gradients[:, 1:] += np.abs(np.diff(luminance, axis=1))
    gradients[1:, :] += np.abs(np.diff(luminance, axis=0))
    sums = np.pad(gradients.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    rows = np.arange(0, height - tall + 1, ALIGNMENT_PX)[:, None]
    columns = np.arange(0, width - wide + 1, ALIGNMENT_PX)[None, :]
    windows = sums[rows + tall, columns + wide] - sums[rows, columns + wide] - sums[rows + tall, columns] + sums[rows, columns]
    row, column = np.unravel_index(int(windows.argmax()), windows.shape)
    upper, left = int(row) * ALIGNMENT_PX, int(column) * ALIGNMENT_PX
    return left, upper, left + wide, upper + tall


def data_uri(image: Image.Image, *, lossless: bool) -> str:
    """Return the picture as a `data:` URI: PNG, or JPEG at quality 92 without chroma subsampling."""
    buffer = io.BytesIO()
    if lossless:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=92, subsampling=0)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def embedded(image: Image.Image) -> Image.Image:
    """Return the picture, reduced if a side is longer than the page can use."""
    longest = max(image.size)
    if longest <= EMBEDDED_PX:
        return image
    width, height = (max(1, round(side * EMBEDDED_PX / longest)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def comparison_strip(images: Mapping[str, Image.Image], *, column_px: int = 336) -> Image.Image:
    """Return one labelled picture: every version whole, with its detail window enlarged beneath.

    Args:
        images: label -> picture; the last is the reference that gives size and detail window.
        column_px: width of one version; the window is enlarged to it by repeating pixels.
    Raises:
        ValueError: if there is no picture.
    """
    versions = at_reference_size(images)
    reference = next(reversed(versions.values()))
    box = detail_box(reference, min(DETAIL_PX, *reference.size))
    gap, label_px = 12, 40
    whole_px = max(1, round(reference.height * column_px / reference.width))
    size = (gap + len(versions) * (column_px + gap), label_px + whole_px + gap + column_px + gap)
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=20)
    for index, (label, image) in enumerate(versions.items()):
        left = gap + index * (column_px + gap)
        draw.text((left, label_px / 2), label, fill=INK, font=font, anchor="lm")
        canvas.paste(image.resize((column_px, whole_px), Image.Resampling.LANCZOS), (left, label_px))
        _outline(draw, box, column_px / reference.width, (left, label_px))
        crop = image.crop(box).resize((column_px, column_px), Image.Resampling.NEAREST)
        canvas.paste(crop, (left, label_px + whole_px + gap))
    return canvas


def _outline(draw: ImageDraw.ImageDraw, box: Box, scale: float, corner: tuple[int, int]) -> None:
    left, upper, right, lower = (round(side * scale) for side in box)
    x, y = corner
    draw.rectangle((x + left, y + upper, x + right - 1, y + lower - 1), outline=PAPER, width=4)
    draw.rectangle((x + left + 1, y + upper + 1, x + right - 2, y + lower - 2), outline=FRAME, width=2)


def contact_sheet(strips: Sequence[PhotoStrip], *, column_px: int = 256) -> Image.Image:
    """Return the comparison strips of several photographs one below the other, for a tracking server.

    Raises:
        ValueError: if there is no photograph.
    """
    if not strips:
        raise ValueError("contact sheet: got no photograph; expected at least one")
    pictures = [comparison_strip(strip.images, column_px=column_px) for strip in strips]
    sheet = Image.new("RGB", (max(picture.width for picture in pictures), sum(picture.height for picture in pictures)), PAPER)
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet
