"""JPEG pictures: the same pixels whoever decodes them, the size without decoding, and the same files refused."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from linearsr_platform.data.images import BadImageError, decode_image
from linearsr_platform.data.jpeg import JpegDecoder, jpeg_header

pytest.importorskip("simplejpeg")


@pytest.fixture(scope="module")
def photo(root: Path) -> Image.Image:
    with Image.open(root / "pipelines/quickstart/example.jpg") as image:
        return image.convert("RGB")


def encoded(image: Image.Image, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("quality", [30, 75, 95])
@pytest.mark.parametrize("progressive", [False, True])
def test_both_decoders_give_the_same_pixels(photo: Image.Image, subsampling: int, quality: int, progressive: bool) -> None:
    # Odd sides: the last column and row of chroma blocks are where upsampling may differ.
    for box in ((0, 0, 97, 83), (10, 20, 139, 150), (5, 5, 6, 6)):
        content = encoded(photo.crop(box), quality=quality, subsampling=subsampling, progressive=progressive)
        fast, slow = JpegDecoder(), JpegDecoder(fast=False)
        assert (fast.name, slow.name) == ("simplejpeg", "pillow")
        pixels = fast.decode(content)
        assert np.array_equal(pixels, slow.decode(content))
        assert not pixels.flags.writeable
        header = jpeg_header(content)
        assert (header.height_px, header.width_px) == pixels.shape[:2]


def test_kinds_that_only_pillow_knows_go_to_it(photo: Image.Image) -> None:
    small = photo.crop((0, 0, 40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    for content in (encoded(small.convert("L")), encoded(small.convert("CMYK")), encoded(small, exif=exif)):
        assert np.array_equal(JpegDecoder().decode(content), decode_image(content).pixels)
    assert JpegDecoder().decode(encoded(small, exif=exif)).shape == (40, 30, 3)


def test_broken_files_are_refused_by_both(photo: Image.Image) -> None:
    whole = encoded(photo.crop((0, 0, 64, 64)), quality=95)
    for broken in (b"", b"\xff\xd8", whole[:15], whole[: len(whole) // 2], b"\xff\xd8" + b"\xff\xda" * 40, b"\x89PNG" + bytes(60)):
        for fast in (True, False):
            with pytest.raises(BadImageError):
                JpegDecoder(fast=fast).decode(broken)


def test_harmless_flaws_are_not_held_against_a_file(photo: Image.Image) -> None:
    whole = encoded(photo.crop((0, 0, 64, 64)))
    # Before its end, and between its first two segments.
    for flawed in (whole[:-2] + b"\0\0\0" + whole[-2:], whole[:20] + b"\0\0" + whole[20:]):
        assert np.array_equal(JpegDecoder().decode(flawed), decode_image(flawed).pixels)
