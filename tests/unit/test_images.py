"""Image files of every kind come out as upright 8-bit RGB, or not at all."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from linearsr_platform.data.images import BadImageError, Pixels, decode_image, decode_png, encode_png, sharpness


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int = 40, width: int = 60) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png_48_bit(samples: np.ndarray) -> bytes:
    """Write (H, W, 3) uint16 as PNG, which Pillow reads but cannot write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(orientation: int) -> None:
    upright = noise()
    # What a camera held that way stores: the inverse of what the tag asks for.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert np.array_equal(decode_image(content).pixels, upright)


def test_cmyk_becomes_rgb() -> None:
    content = encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG", quality=95)
    red, green, blue = decode_image(content).pixels.reshape(-1, 3).mean(axis=0)
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16)[None].repeat(8, axis=0)
    pixels = decode_image(encoded(Image.fromarray(ramp), kind)).pixels
    assert pixels.shape == (8, 64, 3)
    assert np.abs(pixels[0, :, 1] - np.linspace(0, 255, 64)).max() <= 0.51


def test_16_bit_colour_is_scaled_not_clipped() -> None:
    samples = np.stack([np.full((8, 8), level, dtype=np.uint16) for level in (0, 30000, 65535)], axis=2)
    assert np.abs(decode_image(png_48_bit(samples)).pixels[0, 0] - np.array([0, 30000 / 257, 255])).max() <= 1


def test_transparency_is_laid_over_white() -> None:
    layer = np.zeros((4, 4, 4), dtype=np.uint8)
    layer[0, 0] = (200, 0, 0, 255)
    layer[0, 1] = (0, 0, 0, 128)
    pixels = decode_image(encoded(Image.fromarray(layer), "PNG")).pixels
    assert pixels[0, 0].tolist() == [200, 0, 0]
    assert abs(int(pixels[0, 1, 0]) - 127) <= 1
    assert pixels[3, 3].tolist() == [255, 255, 255]


def test_palettes_keep_their_colours_and_lose_their_transparency() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 200, 30, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert decode_image(encoded(image, "PNG")).pixels[0, :2].tolist() == [[10, 200, 30], [0, 0, 255]]
    assert decode_image(encoded(image, "PNG", transparency=0)).pixels[0, :2].tolist() == [[255, 255, 255], [0, 0, 255]]


def test_grey_gets_three_equal_channels() -> None:
    pixels = decode_image(encoded(Image.fromarray(noise()[..., 0]), "PNG")).pixels
    assert np.array_equal(pixels, noise()[..., :1].repeat(3, axis=2))


def test_only_jpeg_is_halved_and_by_exactly_two() -> None:
    smooth = Image.fromarray(np.linspace(0, 255, 61 * 41 * 3).reshape(41, 61, 3).astype(np.uint8))
    assert decode_image(encoded(smooth, "JPEG"), halve_jpeg=True).pixels.shape == (20, 30, 3)
    assert decode_image(encoded(smooth, "JPEG"), halve_jpeg=False).pixels.shape == (41, 61, 3)
    assert decode_image(encoded(smooth, "PNG"), halve_jpeg=True).pixels.shape == (41, 61, 3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"not an image at all", "not an image"),
        (encoded(Image.fromarray(noise()), "PNG")[:-3000], "truncated"),
        (encoded(Image.fromarray(noise()), "JPEG")[:-300], "truncated"),
        (encoded(Image.fromarray(np.ones((8, 8), dtype=np.float32)), "TIFF"), "no defined white"),
    ],
    ids=["empty", "text", "png", "jpeg", "float"],
)
def test_what_cannot_be_used_is_refused_with_the_reason(content: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        decode_image(content)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(Image.fromarray(noise()), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 60 // 2 - 1)
    with pytest.raises(BadImageError, match="bomb"):
        decode_image(content)


def test_png_round_trip_is_exact_and_repeatable() -> None:
    assert np.array_equal(decode_png(encode_png(noise())), noise())
    assert encode_png(noise()) == encode_png(noise().copy(order="F"))
    with pytest.raises(BadImageError):
        decode_png(encode_png(noise())[:-100])


def test_blur_lowers_sharpness() -> None:
    sharp = np.zeros((32, 32, 3), dtype=np.uint8)
    sharp[:, 16:] = 255
    soft = np.linspace(0, 255, 32).astype(np.uint8)[None, :, None].repeat(32, axis=0).repeat(3, axis=2)
    assert sharpness(sharp) > 10 * sharpness(soft)
