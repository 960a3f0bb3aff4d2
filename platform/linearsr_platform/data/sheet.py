"""Contact sheets: many pictures at a glance, each above its name."""

from collections.abc import Sequence
from math import ceil

from PIL import Image, ImageDraw, ImageFont

from linearsr_platform.data.images import Pixels

THUMBNAIL_PX = 192
GAP_PX = 12
TEXT_PX = 13
LINES = 2
"""Lines of a name at most."""
LINE_PX = TEXT_PX + 4
BACKGROUND, INK, QUIET = "white", "#1a1a1a", "#8a8a8a"


def contact_sheet(pictures: Sequence[tuple[str, Pixels]], *, columns: int = 6) -> Image.Image:
    """Lay pictures out in rows, reduced to fit a square of `THUMBNAIL_PX`, each with its name and size below.

    Args:
        pictures: name and pixels (H, W, 3); at least one.
        columns: pictures a row at most.
    """
    columns = min(columns, len(pictures))
    cell = (THUMBNAIL_PX + GAP_PX, THUMBNAIL_PX + GAP_PX + LINE_PX * (LINES + 1))
    sheet = Image.new("RGB", (columns * cell[0] + GAP_PX, ceil(len(pictures) / columns) * cell[1] + GAP_PX), BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT_PX)
    for position, (name, pixels) in enumerate(pictures):
        row, column = divmod(position, columns)
        left, top = GAP_PX + column * cell[0], GAP_PX + row * cell[1]
        thumbnail = Image.fromarray(pixels)
        thumbnail.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
        # On one line with its neighbours, above the name.
        sheet.paste(thumbnail, (left, top + THUMBNAIL_PX - thumbnail.height))
        lines = [*_lines(name, draw, font), f"{pixels.shape[1]}x{pixels.shape[0]}"]
        for number, line in enumerate(lines):
            ink = QUIET if number == len(lines) - 1 else INK
            draw.text((left, top + THUMBNAIL_PX + 4 + number * LINE_PX), line, fill=ink, font=font)
    return sheet


def _lines(name: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Break a name into lines as wide as a thumbnail; of a longer one the end is kept, which tells it from its neighbours."""

    def fits(text: str) -> bool:
        return draw.textlength(text, font=font) <= THUMBNAIL_PX

    lines = [""]
    for character in name:
        if not fits(lines[-1] + character):
            lines.append("")
        lines[-1] += character
    if len(lines) <= LINES:
        return lines
    end = lines[0]
    rest = name[len(end) :]
    while not fits(f"...{rest}"):
        rest = rest[1:]
    return [end, f"...{rest}"]
