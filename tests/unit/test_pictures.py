"""Picture files of every kind: what comes in, what goes out again, and what is said about it."""

import struct
from dataclasses import replace
from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from linearsr.picture_files import encode_picture, fit_format, output_suffix, quantise
from linearsr.pictures import Picture, PictureError, decode_picture, read_picture, resample, srgb_profile

RANDOM = np.random.default_rng(0)


def encoded(image, kind="PNG", **options):
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(width=7, height=5):
    return Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bits_come_in_whole_and_go_out_whole(suffix, channels):
    samples = RANDOM.integers(0, 65536, (5, 7, channels), dtype=np.uint16)
    stored = samples if channels == 1 else samples[..., [2, 1, 0, 3][:channels]]  # OpenCV wants BGR.
    picture = decode_picture(cv2.imencode(suffix, stored)[1].tobytes(), "deep")
    assert (picture.bits, picture.grey, picture.alpha is not None) == (16, channels == 1, channels == 4)
    assert np.array_equal(quantise(picture), samples)
    back = cv2.imdecode(np.frombuffer(encode_picture(picture, ".png"), np.uint8), cv2.IMREAD_UNCHANGED)
    assert back.dtype == np.uint16
    assert np.array_equal(back.reshape(stored.shape), stored)


def test_16_bit_grey_with_alpha_is_written_whole_and_read_at_8_bits_with_a_word():
    samples = RANDOM.integers(0, 65536, (6, 4, 2), dtype=np.uint16)
    light, alpha = (samples[..., channel].astype(np.float32) / 65535 for channel in (0, 1))
    content = encode_picture(Picture(np.repeat(light[..., None], 3, 2), alpha, grey=True, bits=16), ".png")
    assert np.array_equal(cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)[..., [0, 3]], samples)
    again = decode_picture(content, "la16")
    assert (again.bits, again.grey, again.notes) == (8, True, ("16-bit samples read at 8 bits: this kind cannot be read in full",))
    assert np.array_equal(quantise(again), samples >> 8)


@pytest.mark.parametrize(
    ("mode", "grey", "alpha", "said"),
    [("L", True, False, ""), ("LA", True, True, ""), ("RGB", False, False, ""), ("RGBA", False, True, ""), ("P", False, False, "palette")],
)
def test_8_bit_pictures_keep_their_channels_exactly(mode, grey, alpha, said):
    image = rgb().convert("RGBA")
    image.putalpha(Image.fromarray(RANDOM.integers(0, 256, (5, 7), dtype=np.uint8)))
    image = image.convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE) if mode == "P" else image.convert(mode)
    picture = decode_picture(encoded(image), "a")
    assert (picture.grey, picture.alpha is not None, picture.bits) == (grey, alpha, 8)
    assert said in " ".join(picture.notes)
    expected = image if mode in ("L", "LA") else image.convert("RGBA" if alpha else "RGB")
    with Image.open(BytesIO(encode_picture(picture, ".png"))) as back:
        assert back.mode == expected.mode
        assert np.array_equal(np.asarray(back), np.asarray(expected))


def test_exif_is_kept_upright_without_thumbnail_and_without_the_old_size():
    exif = Image.Exif()
    exif[0x0110], exif[0x0112] = "Camera", 6  # Turn right to see it upright.
    exif.get_ifd(0x8769).update({0xA002: 7, 0xA003: 5, 0x9003: "2020:01:01 00:00:00"})
    exif.get_ifd(0x8825)[2] = (1.0, 2.0, 3.0)
    exif.get_ifd(1)[0x0103] = 6
    image = rgb()
    for kind, suffix in (("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp"), ("TIFF", ".png")):
        picture = decode_picture(encoded(image, kind, exif=exif), "turned")
        assert picture.size == (5, 7)
        assert "turned upright as its EXIF says" in picture.notes
        with Image.open(BytesIO(encode_picture(picture, suffix))) as back:
            kept = back.getexif()
            assert back.size == (5, 7)
        assert kept[0x0110] == "Camera", kind
        assert kept.get(0x0112, 1) == 1
        assert not kept.get_ifd(1)
        assert 0x0111 not in kept, "a TIFF's own layout is no EXIF"
        if kind != "TIFF":  # Pillow writes none of these into a TIFF.
            assert kept.get_ifd(0x8769)[0x9003] == "2020:01:01 00:00:00"
            assert not {0xA002, 0xA003} & set(kept.get_ifd(0x8769))
            assert kept.get_ifd(0x8825)[2] == (1.0, 2.0, 3.0)


def test_xmp_is_left_out_with_a_word():
    picture = decode_picture(encoded(rgb(), "JPEG", xmp=b"<x:xmpmeta/>"), "a.jpg")
    assert picture.notes == ("XMP left out: it may tell of the old size and orientation",)
    with Image.open(BytesIO(encode_picture(picture, ".jpg"))) as back:
        assert "xmp" not in back.info


def test_resolution_is_kept_and_texts_are_left_out_with_a_word():
    exif = Image.Exif()
    exif[0x0112] = 6
    texts = PngInfo()
    texts.add_text("Comment", "by hand")
    said = "left out: of texts only EXIF is kept"
    for kind, suffix, more, notes in (
        ("JPEG", ".jpg", {"comment": b"by hand"}, [f"comment {said}"]),
        ("PNG", ".png", {"pnginfo": texts}, [f"text 'Comment' {said}"]),
        ("TIFF", ".png", {}, []),
    ):
        picture = decode_picture(encoded(rgb(), kind, dpi=(300, 200), exif=exif, **more), "a")
        for bits in (8, 16) if suffix == ".png" else (8,):
            with Image.open(BytesIO(encode_picture(replace(picture, bits=bits), suffix))) as back:
                assert [round(one) for one in back.info["dpi"]] == [200, 300], (kind, bits)
        assert picture.notes == ("turned upright as its EXIF says", *notes)
    assert fit_format(replace(picture, exif=None), ".webp").notes[-1] == "resolution left out: WebP has no place for it but EXIF"


def test_exif_that_a_png_has_as_a_text_is_kept_and_not_said_to_be_left_out():
    exif, texts = Image.Exif(), PngInfo()
    exif[0x0110] = "Camera"
    texts.add_text("Raw profile type exif", f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n", zip=True)
    picture = decode_picture(encoded(rgb(), "PNG", pnginfo=texts), "a.png")
    assert (picture.exif, picture.notes) == (exif.tobytes(), ())


def test_iptc_is_left_out_with_a_word_and_no_resolution_is_made_up():
    block = b"8BIM\x04\x04\0\0" + struct.pack(">I", 4) + b"\x1c\x02\x05\0"
    segment = b"\xff\xed" + struct.pack(">H", 2 + 14 + len(block)) + b"Photoshop 3.0\0" + block
    exif = Image.Exif()
    exif[0x0110] = "Camera"
    jpeg = encoded(rgb(), "JPEG", exif=exif)
    picture = decode_picture(jpeg[:2] + segment + jpeg[2:], "a.jpg")
    assert picture.notes == ("IPTC left out: of texts only EXIF is kept",)
    assert picture.dpi is None, "Pillow's 72 dpi are nobody's"


def wide_profile():
    """A profile of another space: sRGB with its red and blue primaries exchanged, so that a conversion must show."""
    content = bytearray(srgb_profile())
    red, blue = content.index(b"rXYZ"), content.index(b"bXYZ")
    content[red : red + 4], content[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(content).replace("sRGB".encode("utf-16-be"), "oRGB".encode("utf-16-be"))


def test_profiles_srgb_stays_others_become_srgb_and_are_named():
    image, own = rgb(), srgb_profile()
    same = decode_picture(encoded(image, icc_profile=own), "same")
    assert same.profile == own
    assert np.array_equal(quantise(same), np.asarray(image))
    assert srgb_profile() == own, "the profile carries no date"
    foreign = wide_profile()
    turned = decode_picture(encoded(image, icc_profile=foreign), "other")
    expected = ImageCms.profileToProfile(image, ImageCms.ImageCmsProfile(BytesIO(foreign)), ImageCms.createProfile("sRGB"))
    assert np.array_equal(quantise(turned), np.asarray(expected))
    assert not np.array_equal(quantise(turned), np.asarray(image))
    assert "to sRGB, whose profile is attached" in turned.notes[0]
    with Image.open(BytesIO(encode_picture(turned, ".jpg"))) as back:
        assert back.info["icc_profile"] == turned.profile == own
    broken = decode_picture(encoded(image, icc_profile=b"no profile"), "broken")
    assert (broken.profile, broken.notes) == (None, ("unreadable colour profile left out",))


def test_cmyk_becomes_rgb_with_a_word():
    picture = decode_picture(encoded(rgb().convert("CMYK"), "JPEG"), "print.jpg")
    assert picture.notes == ("CMYK converted to RGB by plain arithmetic: it has no profile",)
    assert not picture.grey


def test_16_bit_files_carry_profile_and_exif():
    exif = Image.Exif()
    exif[0x0110] = "Camera"
    picture = Picture(np.zeros((2, 3, 3), np.float32), bits=16, profile=srgb_profile(), exif=exif.tobytes())
    again = decode_picture(encode_picture(picture, ".png"), "deep")
    assert (again.profile, again.bits) == (picture.profile, 16)
    with Image.open(BytesIO(encode_picture(again, ".png"))) as back:
        assert back.getexif()[0x0110] == "Camera"


def test_what_a_format_cannot_hold_is_said():
    picture = Picture(np.zeros((2, 3, 3), np.float32), alpha=np.zeros((2, 3), np.float32), bits=16)
    jpeg = fit_format(picture, ".jpg")
    assert jpeg.notes == ("16 bits reduced to 8: jpg holds no more", "transparency laid over white: JPEG has none")
    assert (jpeg.bits, jpeg.alpha, float(jpeg.colour.min())) == (8, None, 1.0)
    assert fit_format(picture, ".png") == picture
    for suffix, limit in ((".jpg", 65500), (".webp", 16383)):
        largest = encode_picture(Picture(np.zeros((1, limit, 3), np.float32)), suffix)
        assert decode_picture(largest, "largest").size == (limit, 1)
        with pytest.raises(ValueError, match=f"at most {limit} a side; fix: write PNG"):
            fit_format(Picture(np.zeros((1, limit + 1, 3), np.float32)), suffix)
    assert [output_suffix(suffix) for suffix in (".JPG", ".tif", ".bmp", ".webp")] == [".JPG", ".png", ".png", ".webp"]


def test_files_that_are_no_pictures_are_named(tmp_path):
    whole = encoded(rgb(64, 64))
    for name, content, said in (
        ("cut.png", whole[: len(whole) // 2], "cannot be decoded"),
        ("text.jpg", b"hello", "not a picture"),
        ("empty.png", b"", "not a picture"),
        ("float.tiff", encoded(Image.new("F", (3, 3)), "TIFF"), "no defined white"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PictureError, match=f"{name}: .*{said}"):
            read_picture(tmp_path / name)
    with pytest.raises(PictureError, match=r"gone\.png: cannot be read"):
        read_picture(tmp_path / "gone.png")


def test_resampling_keeps_constants_and_the_range():
    plane = np.full((5, 4), 0.25, np.float32)
    assert np.allclose(resample(plane, (9, 11), Image.Resampling.LANCZOS), 0.25)
    edge = np.zeros((8, 8), np.float32)
    edge[:, 4:] = 1
    enlarged = resample(edge, (32, 32), Image.Resampling.LANCZOS)
    assert (enlarged.min(), enlarged.max()) == (0, 1)
