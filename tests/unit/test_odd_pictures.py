"""Picture files as scanners, phones and old programs leave them: odd samples, damaged or foreign EXIF, profiles nobody can use."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from linearsr.picture_files import encode_picture, fit_format, quantise
from linearsr.pictures import Picture, PictureError, decode_picture, srgb_profile
from linearsr_platform.data.images import BadImageError, decode_image


def encoded(image, kind="PNG", **options):
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey_tiff(samples, bits, photometric, orientation=1):
    """An uncompressed TIFF of one channel, 12 or 16 bits, which Pillow does not write."""
    height, width = samples.shape
    if bits == 12:
        pairs = samples.reshape(-1, 2).astype(np.uint32)
        packed = b"".join(int(first << 12 | second).to_bytes(3, "big") for first, second in pairs)
    else:
        packed = samples.astype("<u2").tobytes()
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 274: orientation, 277: 1, 278: height, 279: len(packed)}
    entries[273] = 8 + 2 + 12 * (len(entries) + 1) + 4
    table = b"".join(struct.pack("<HHII", tag, 4, 1, entries[tag]) for tag in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + struct.pack("<I", 0) + packed


@pytest.mark.parametrize(("bits", "photometric"), [(12, 1), (16, 1), (16, 0)])
def test_white_of_a_grey_tiff_is_what_it_says(bits, photometric):
    samples = np.random.default_rng(0).integers(0, 2**bits, (6, 8), dtype=np.uint16)
    samples[0, :2] = 0, 2**bits - 1
    light = samples / (2**bits - 1)
    light = 1 - light if photometric == 0 else light
    content = grey_tiff(samples, bits, photometric)
    picture = decode_picture(content, "scan.tif")
    assert (picture.grey, picture.bits) == (True, 16)
    assert np.allclose(picture.colour, light[..., None], atol=1e-6)
    # What training reads is the same picture.
    assert np.array_equal(decode_image(content).pixels, np.rint(light * 255).astype(np.uint8)[..., None].repeat(3, axis=2))


def planar_tiff(samples, *, deflated):
    """A TIFF of 16-bit RGB with one strip for each colour."""
    height, width, _ = samples.shape
    planes = [samples[..., channel].astype("<u2").tobytes() for channel in range(3)]
    planes = [zlib.compress(plane) for plane in planes] if deflated else planes
    sizes = [len(plane) for plane in planes]
    entries = {
        256: (width,),
        257: (height,),
        258: (16,) * 3,
        259: (8 if deflated else 1,),
        262: (2,),
        277: (3,),
        278: (height,),
        279: sizes,
    }
    entries |= {273: (0,) * 3, 284: (2,)}
    start = 8 + 2 + 12 * len(entries) + 4
    after = start + 12 * sum(len(values) == 3 for values in entries.values())
    entries[273] = tuple(after + sum(sizes[:channel]) for channel in range(3))
    table, more = b"", b""
    for tag in sorted(entries):
        values = struct.pack(f"<{len(entries[tag])}I", *entries[tag])
        table += struct.pack("<HHI", tag, 4, len(entries[tag])) + (values if len(values) == 4 else struct.pack("<I", start + len(more)))
        more += values if len(values) > 4 else b""
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + struct.pack("<I", 0) + more + b"".join(planes)


def test_16_bits_stored_plane_by_plane_are_read_at_8_bits_or_refused_and_never_wrong():
    samples = np.random.default_rng(2).integers(0, 65536, (6, 8, 3), dtype=np.uint16)
    content = planar_tiff(samples, deflated=True)
    picture = decode_picture(content, "planes.tif")
    assert (picture.bits, picture.notes) == (8, ("16-bit samples read at 8 bits: they are stored plane by plane",))
    assert np.array_equal(quantise(picture), samples >> 8)
    assert np.array_equal(decode_image(content).pixels, samples >> 8)
    # Pillow takes each of their bytes for a sample.
    raw = planar_tiff(samples, deflated=False)
    with pytest.raises(PictureError, match=r"planes\.tif: .*plane by plane without compression"):
        decode_picture(raw, "planes.tif")
    with pytest.raises(BadImageError, match="plane by plane without compression"):
        decode_image(raw)


def test_a_grey_tiff_of_16_bits_is_turned_upright():
    samples = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    content = grey_tiff(samples, 16, 1, orientation=6)
    assert np.array_equal(quantise(decode_picture(content, "scan.tif"))[..., 0], np.rot90(samples, -1))
    assert decode_image(content).pixels.shape == (4, 3, 3)


@pytest.mark.parametrize(("channels", "key"), [(1, (1000,)), (3, (1000, 2000, 3000))])
def test_the_transparent_colour_of_a_16_bit_png_is_transparent(channels, key):
    samples = np.random.default_rng(3).integers(256 * 20, 65536, (6, 8, channels), dtype=np.uint16)
    samples[:2, :3] = key
    colour = samples.repeat(3 // channels, axis=2).astype(np.float32) / 65535
    content = encode_picture(Picture(colour, grey=channels == 1, bits=16), ".png")
    chunk = b"tRNS" + struct.pack(f">{channels}H", *key)
    start = content.index(b"IDAT") - 4
    content = content[:start] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[start:]
    expected = np.ones((6, 8), np.float32)
    expected[:2, :3] = 0
    picture = decode_picture(content, "key.png")
    assert (picture.bits, picture.grey) == (16, channels == 1)
    assert np.array_equal(picture.alpha, expected)
    assert np.array_equal(quantise(picture)[..., :channels], samples)
    # In training what is transparent is white.
    pixels = decode_image(content).pixels
    assert (pixels[:2, :3] == 255).all()
    assert np.abs(pixels[2:] - colour[2:] * 255).max() < 1


def test_a_printed_picture_with_a_profile_is_turned_upright(monkeypatch):
    # No CMYK profile is free to ship: the conversion is plain, but like the real one returns a picture without EXIF.
    monkeypatch.setattr(ImageCms, "profileToProfile", lambda image, *_, **__: Image.fromarray(np.asarray(image.convert("RGB"))))
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("CMYK", (6, 4), (0, 255, 255, 0))
    picture = decode_picture(encoded(image, "JPEG", exif=exif, icc_profile=srgb_profile()), "print.jpg")
    assert picture.size == (4, 6)
    assert picture.notes == ("turned upright as its EXIF says", "CMYK converted to sRGB by its profile")


def test_a_profile_that_cannot_be_used_is_left_out_with_a_word():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (4, 5, 3), dtype=np.uint8))
    profile = srgb_profile().replace(b"rXYZ", b"nope").replace("sRGB".encode("utf-16-be"), "oRGB".encode("utf-16-be"))
    picture = decode_picture(encoded(image, icc_profile=profile), "scan.png")
    assert picture.profile is None
    assert picture.notes == ("colour profile 'oRGB built-in' left out: it cannot be used",)
    assert np.array_equal(quantise(picture), np.asarray(image))


@pytest.mark.parametrize("place", [12, 16, 20, 36])
def test_a_damaged_header_of_a_profile_costs_no_more_than_the_profile(place):
    profile = srgb_profile()
    broken = profile[:place] + b"\xd2" + profile[place + 1 :]
    picture = decode_picture(encoded(Image.new("RGB", (5, 4)), icc_profile=broken), "a.png")
    assert picture.size == (5, 4)
    assert picture.profile in (None, broken, srgb_profile())


def entries_of(content):
    """Raw entries of a picture's EXIF by tag, in the file's first folder and its Exif folder: type and bytes."""
    with Image.open(BytesIO(content)) as image:
        block = image.info["exif"].removeprefix(b"Exif\0\0")
    order = ">" if block[:2] == b"MM" else "<"
    found = {}

    def read(offset):
        (count,) = struct.unpack_from(order + "H", block, offset)
        for place in range(count):
            tag, kind, length, value = struct.unpack_from(order + "HHII", block, offset + 2 + 12 * place)
            if tag == 0x8769:
                read(value)
            elif kind == 2:
                start = value if length > 4 else offset + 10 + 12 * place
                found[tag] = kind, block[start : start + length]

    read(*struct.unpack_from(order + "I", block, 4))
    return found


def test_exif_text_keeps_its_bytes_and_its_type():
    names = {0x8298: "© 2020 Jürgen".encode(), 0x9003: b"2020:01:01 00:00:00", 0xA434: "Ø 50 mm".encode("latin-1")}

    class Raw(str):
        def encode(self, *_):
            return super().encode("latin-1")

    exif = Image.Exif()
    exif[0x8298] = Raw(names[0x8298].decode("latin-1"))
    exif.get_ifd(0x8769).update({tag: Raw(names[tag].decode("latin-1")) for tag in (0x9003, 0xA434)})
    content = encoded(Image.new("RGB", (4, 4)), "JPEG", exif=exif)
    expected = {tag: (2, text + b"\0") for tag, text in names.items()}
    assert entries_of(content) == expected
    assert entries_of(encode_picture(decode_picture(content, "a.jpg"), ".jpg")) == expected


def test_exif_that_cannot_be_written_again_costs_the_exif_and_not_the_picture():
    exif = Image.Exif()
    exif[0x010F] = "Camera"
    # XResolution is a fraction; some programs store text.
    block = exif.tobytes().replace(struct.pack(">HH", 0x010F, 2), struct.pack(">HH", 0x011A, 2))
    picture = decode_picture(encoded(Image.new("RGB", (4, 4)), "JPEG", exif=block), "odd.jpg")
    assert (picture.exif, picture.notes) == (None, ("EXIF left out: it is not as EXIF has to be",))


def test_exif_larger_than_jpeg_holds_is_left_out_with_a_word():
    exif = Image.Exif()
    exif[0x010E] = "x" * 70_000
    picture = decode_picture(encoded(Image.new("RGB", (4, 4)), "PNG", exif=exif), "long.png")
    jpeg = fit_format(picture, ".jpg")
    assert (jpeg.exif, jpeg.notes) == (None, ("EXIF left out: JPEG holds no more than 64 kB of it",))
    assert decode_picture(encode_picture(jpeg, ".jpg"), "long.jpg").size == (4, 4)
    assert fit_format(picture, ".png").exif == picture.exif


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_a_png_with_damaged_pixels_is_no_picture(mode):
    noise = Image.fromarray(np.random.default_rng(4).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    image = Image.fromarray(np.asarray(noise.convert("L")).astype(np.uint16) * 257) if mode == "I;16" else noise.convert(mode)
    content = encoded(image)
    first, end = content.index(b"IDAT") + 4, content.index(b"IEND") - 8
    for place in range(first, end, 7):
        for damaged in (content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :], content[:place]):
            with pytest.raises(PictureError, match=r"a\.png: cannot be decoded"):
                decode_picture(damaged, "a.png")
            with pytest.raises(BadImageError, match="cannot be decoded"):
                decode_image(damaged)


@pytest.mark.parametrize(("kind", "place"), [("DDS", 80), ("AVIF", 81)])
def test_whatever_a_decoder_raises_is_said_of_the_file(kind, place):
    if not features.check("avif") and kind == "AVIF":
        pytest.skip("this Pillow reads no AVIF")
    content = encoded(Image.new("RGB", (9, 8)), kind)
    broken = content[:place] + b"\0" + content[place + 1 :]
    with pytest.raises(PictureError, match=r"a\.png: cannot be decoded"):
        decode_picture(broken, "a.png")
    with pytest.raises(BadImageError, match="cannot be decoded"):
        decode_image(broken)
