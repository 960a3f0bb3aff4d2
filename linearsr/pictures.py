"""Picture files to pixels and back, with what else is in them: depth, alpha, grey, colour profile, resolution, EXIF. Imports no torch.

Pixels are float32 in [0, 1] and sRGB. Whatever is converted or left out on the way is said in `Picture.notes`.
"""

import struct
import zlib
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from linearsr.exif import carried_exif

Plane = NDArray[np.float32]

DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's decoders raise on files that are not what they claim to be, much of it by oversight: of an AVIF with a broken box, say,
`RuntimeError`."""
IPTC = 0x0404
"""Photoshop's number of it in a JPEG."""
PNG_XMP = "XML:com.adobe.xmp"
PNG_EXIF = "Raw profile type exif"
"""What ImageMagick calls it, and Pillow reads as EXIF."""
MOST_DPI = 65535
"""What a JPEG can say."""
LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601 weights of red, green and blue."""


class PictureError(ValueError):
    """A file that cannot be read as a picture; the message names it."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture in memory, upright."""

    colour: Plane
    """(H, W, 3) sRGB in [0, 1]; grey pictures have three equal channels."""
    alpha: Plane | None = None
    """(H, W) in [0, 1], not multiplied into the colours; None if everything is opaque by its format."""
    grey: bool = False
    """Whether the file had one channel of light, and is to have one again."""
    bits: int = 8
    """Bits of a sample of the file, 8 or 16."""
    profile: bytes | None = None
    """ICC profile that the pixels are in; None if the file had none."""
    exif: bytes | None = None
    """EXIF as it is to be written again, without orientation, thumbnail and the old size."""
    dpi: tuple[float, float] | None = None
    """Dots per inch across and down, as the file says; None if it does not."""
    notes: tuple[str, ...] = ()
    """What was converted, in words."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.colour.shape[1], self.colour.shape[0]


def read_picture(path: Path) -> Picture:
    """Read a picture file; see `decode_picture`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PictureError(f"{path}: cannot be read: {error.strerror}; expected a picture file; fix: check the path") from error
    return decode_picture(content, str(path))


def decode_picture(content: bytes, name: str) -> Picture:
    """Decode a picture file of whatever kind Pillow reads.

    Args:
        content: bytes of the file.
        name: what errors call it.

    Raises:
        PictureError: if it is cut off, no picture, suspiciously large or has no defined white.
    """
    try:
        with Image.open(BytesIO(content)) as image:
            notes: list[str] = []
            if getattr(image, "n_frames", 1) > 1:
                notes.append(f"first of {getattr(image, 'n_frames', 1)} frames taken")
            check_planes(image)
            grey = image.mode in ("1", "L", "LA", "La") or (_raw_mode(image) or "").startswith("LA")  # Pillow opens 16-bit LA as RGBA.
            deep = _deep_samples(image, content, notes)
            if isinstance(image, PngImageFile):
                # Asked for EXIF it decodes its pixels, and a second time it would not tell that they are broken.
                image.load()
                check_sums(content)
            exif, profile, dpi = _exif(image, notes), image.info.get("icc_profile"), _dpi(image)
            if image.getexif().get(0x0112, 1) not in (0, 1):
                notes.append("turned upright as its EXIF says")
            image.load()
            if image.info.get("xmp"):
                notes.append("XMP left out: it may tell of the old size and orientation")
            if lost := _texts(image):
                notes.append(f"{' and '.join(lost)} left out: of texts only EXIF is kept")
            picture = _from_samples(image, deep) if deep is not None else _from_image(image, notes, grey=grey)
    except DECODING_ERRORS as error:
        reason = why_undecoded(error, "a picture")
        raise PictureError(f"{name}: {reason}; expected a whole picture file; fix: check or convert it") from error
    picture = replace(picture, exif=exif, dpi=dpi, notes=(*notes, *picture.notes))
    return _into_srgb(picture, profile) if profile else picture


def why_undecoded(error: Exception, what: str) -> str:
    """Put a decoder's complaint, one of `DECODING_ERRORS`, into one line.

    Args:
        error: as it was raised.
        what: what the file was taken for, with its article, as in `a picture`.
    """
    if isinstance(error, UnidentifiedImageError):
        return f"not {what} that can be decoded"
    if isinstance(error, Image.DecompressionBombError):
        return f"suspiciously large, possibly a decompression bomb: {error}"
    return f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}"


def resample(plane: Plane, size: tuple[int, int], kernel: Image.Resampling) -> Plane:
    """Resample (H, W) or (H, W, C) to `size` (width, height) in float32, clamped to [0, 1]."""
    if plane.ndim == 3:
        return np.stack([resample(np.ascontiguousarray(plane[..., c]), size, kernel) for c in range(plane.shape[2])], axis=2)
    if size == (plane.shape[1], plane.shape[0]):
        return plane
    return np.asarray(Image.fromarray(plane).resize(size, kernel)).clip(0, 1)


def luma(colour: Plane) -> Plane:
    """Return the grey of (H, W, 3) by BT.601, (H, W)."""
    return (colour @ np.array(LUMA, dtype=np.float32)).astype(np.float32)


def srgb_profile() -> bytes:
    """Return an sRGB profile with a fixed date, so that the same picture gives the same file."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    content[24:36] = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)
    content[84:100] = bytes(16)  # The profile's own hash, which covers the date; zero means that there is none.
    return bytes(content)


def _exif(image: Image.Image, notes: list[str]) -> bytes | None:
    try:
        return carried_exif(image)
    except DECODING_ERRORS:
        # What Pillow reads it cannot always write, and a camera's mistake is no reason to refuse its picture.
        notes.append("EXIF left out: it is not as EXIF has to be")
        return None


def _texts(image: Image.Image) -> list[str]:
    """Return what is told in an opened picture besides EXIF and XMP: `IPTC`, `comment`, and keywords of a PNG's texts."""
    tags: Any = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    iptc = Base.IPTCNAA in tags or IPTC in (image.info.get("photoshop") or {})
    texts = image.text if isinstance(image, PngImageFile) else {}
    found = [f"text {keyword!r}" for keyword in texts if keyword not in (PNG_XMP, PNG_EXIF)]
    return [*(["IPTC"] if iptc else []), *(["comment"] if image.info.get("comment") else []), *found]


def _dpi(image: Image.Image) -> tuple[float, float] | None:
    """Return the resolution as the enlarged picture is to have it, across and down."""
    dpi = image.info.get("dpi")
    # Of a JPEG that has EXIF without a resolution Pillow says 72, and of a TIFF without one 1.
    if dpi is None or (image.format in ("JPEG", "MPO") and image.info.get("jfif_unit") not in (1, 2)):
        return None
    across, down = (float(one) for one in dpi)
    if not (1 < across <= MOST_DPI and 1 < down <= MOST_DPI):
        return None
    return (down, across) if image.getexif().get(Base.Orientation) in (5, 6, 7, 8) else (across, down)


def _from_image(image: Image.Image, notes: list[str], *, grey: bool) -> Picture:
    """Take 8-bit pixels, and 16-bit grey, which Pillow can hold."""
    mode = image.mode
    if (samples := deep_grey(image)) is not None:
        return Picture(np.repeat(samples[..., None], 3, axis=2), keyed_alpha(image, samples), grey=True, bits=16)
    if mode in ("I", "F"):
        raise ValueError(f"32-bit samples (mode {mode}) have no defined white")
    has_alpha = image.has_transparency_data
    if mode == "P":
        notes.append("palette expanded to RGB")
    elif mode in ("CMYK", "YCCK"):
        # Turned before, because a conversion by profile forgets the EXIF.
        image, said = _from_cmyk(ImageOps.exif_transpose(image))
        notes.append(said)
    elif mode not in ("1", "L", "LA", "La", "RGB", "RGBA", "RGBa"):
        notes.append(f"{mode} converted to RGB")
    upright = ImageOps.exif_transpose(image).convert("RGBA" if has_alpha else "RGB")
    samples = np.asarray(upright).astype(np.float32) / np.float32(255)
    return Picture(np.ascontiguousarray(samples[..., :3]), alpha=samples[..., 3].copy() if has_alpha else None, grey=grey)


def deep_grey(image: Image.Image) -> Plane | None:
    """Return the light of an opened grey picture of more than 8 bits, upright, (H, W) in [0, 1]; None for any other kind.

    A TIFF says itself which sample is white: the largest of its bits (12-bit scans are common), or with MinIsWhite zero.
    """
    # Pillow before 11 opens 16-bit PNG as `I`.
    if not (image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")):
        return None
    tags: Any = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    samples = np.asarray(ImageOps.exif_transpose(image))
    light: Plane = samples.astype(np.float32) / np.float32(2 ** tags.get(Base.BitsPerSample, (16,))[0] - 1)
    return 1 - light if tags.get(Base.PhotometricInterpretation) == 0 else light


def keyed_alpha(image: Image.Image, light: Plane) -> Plane | None:
    """Return what the colour key of a 16-bit PNG says, (H, W): 0 where a pixel has the one transparent colour, else 1; None without a key.

    Args:
        image: the opened picture.
        light: (H, W), or (H, W, 3), in [0, 1]: its pixels, upright.
    """
    key = image.info.get("transparency")
    if key is None:
        return None
    other = np.rint(light * 65535) != np.array(key)
    alpha: Plane = (other if light.ndim == 2 else other.any(axis=2)).astype(np.float32)
    return alpha


def reduce_key(image: Image.Image) -> None:
    """Bring the colour key of an opened 16-bit colour PNG to the 8 bits that Pillow reduces pixels to: their high bytes."""
    if _raw_mode(image) is not None and image.mode == "RGB" and "transparency" in image.info:
        image.info["transparency"] = tuple(one >> 8 for one in image.info["transparency"])


def _from_cmyk(image: Image.Image) -> tuple[Image.Image, str]:
    profile = image.info.get("icc_profile")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            turned = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            return image.convert("RGB"), "CMYK converted to RGB without its profile, which cannot be used"
        if turned is not None:
            return turned, "CMYK converted to sRGB by its profile"
    return image.convert("RGB"), "CMYK converted to RGB by plain arithmetic: it has no profile"


def _into_srgb(picture: Picture, profile: bytes) -> Picture:
    """Bring a profile's pixels into sRGB, or keep both as they are where that is right or nothing else is possible."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        name, space = ImageCms.getProfileDescription(source).strip(), source.profile.xcolor_space.strip()
    except (ImageCms.PyCMSError, OSError, ValueError):
        return replace(picture, notes=(*picture.notes, "unreadable colour profile left out"))
    if space == "CMYK":
        return replace(picture, profile=srgb_profile())
    if "srgb" in name.lower() or picture.grey or space != "RGB":
        return replace(picture, profile=profile if (space == "GRAY") == picture.grey else None)
    if picture.bits == 16:
        return replace(picture, profile=profile, notes=(*picture.notes, f"profile {name!r} kept and its 16-bit values taken as they are"))
    image = Image.fromarray(np.rint(picture.colour * 255).astype(np.uint8))
    try:
        turned = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return replace(picture, notes=(*picture.notes, f"colour profile {name!r} left out: it cannot be used"))
    if turned is None:
        return replace(picture, profile=profile)
    colour = np.asarray(turned).astype(np.float32) / np.float32(255)
    said = f"converted from {name!r} to sRGB, whose profile is attached"
    return replace(picture, colour=colour, profile=srgb_profile(), notes=(*picture.notes, said))


def _deep_samples(image: Image.Image, content: bytes, notes: list[str]) -> NDArray[np.uint16] | None:
    """Return the 16-bit samples (H, W, channels) of a file that Pillow reduces to 8 bits, or None if it does not.

    Pillow's raw modes `16B` and `16L` take the first and the second byte of each sample: decoding once with each gives both.
    """
    raw = _raw_mode(image)
    if raw is None or image.mode not in ("RGB", "RGBA", "LA"):
        return None
    if _in_planes(image):
        notes.append("16-bit samples read at 8 bits: they are stored plane by plane")
        return None
    halves = []
    for order in "BL":
        with Image.open(BytesIO(content)) as other:
            tiles = [tile._replace(args=_with_order(tile.args, order)) for tile in other.tile]
            other.tile = tiles
            try:
                halves.append(np.asarray(ImageOps.exif_transpose(other)).astype(np.uint16))
            except (ValueError, KeyError):
                notes.append("16-bit samples read at 8 bits: this kind cannot be read in full")
                return None
    # PNG is big-endian; libtiff hands over samples in the machine's order, which "N" stands for.
    first_is_high = raw.endswith("B") or (raw.endswith("N") and struct.pack("=H", 1) == struct.pack(">H", 1))
    high, low = halves if first_is_high else reversed(halves)
    return high * 256 + low


def check_planes(image: Image.Image) -> None:
    """Refuse an opened picture that Pillow misreads: of deep planes without compression it takes each byte for a sample.

    Raises:
        ValueError: if it is one.
    """
    deep = isinstance(image, TiffImageFile) and max(image.tag_v2.get(Base.BitsPerSample, (8,))) > 8
    if deep and _in_planes(image) and any(tile.codec_name == "raw" for tile in getattr(image, "tile", [])):
        raise ValueError("16-bit samples stored plane by plane without compression cannot be read; save it with interleaved channels")


def check_sums(content: bytes | memoryview) -> None:
    """Refuse a PNG whose pixels changed since they were written: Pillow does not look at the sums of their chunks.

    Raises:
        ValueError: if a sum differs.

    Source: PNG (W3C, third edition), 5.3 "Chunk layout".
    """
    position = 8
    while position + 12 <= len(content):
        end = position + 8 + int.from_bytes(content[position : position + 4], "big")
        kind, found = content[position + 4 : position + 8], content[end : end + 4]
        if kind == b"IDAT" and zlib.crc32(content[position + 4 : end]).to_bytes(4, "big") != found:
            raise ValueError(f"its pixels are damaged or cut off: the checksum at byte {end} differs")
        position = end + 4


def _in_planes(image: Image.Image) -> bool:
    return isinstance(image, TiffImageFile) and image.tag_v2.get(Base.PlanarConfiguration) == 2 and len(image.getbands()) > 1


def _raw_mode(image: Image.Image) -> str | None:
    tiles = getattr(image, "tile", [])
    arguments = tiles[0].args if tiles else None
    raw = arguments if isinstance(arguments, str) else arguments[0] if isinstance(arguments, tuple) and arguments else None
    return raw if isinstance(raw, str) and ";16" in raw else None


def _with_order(arguments: Any, order: str) -> Any:
    if isinstance(arguments, str):
        return f"{arguments[:-1]}{order}" if ";16" in arguments else arguments
    return tuple(_with_order(one, order) for one in arguments) if isinstance(arguments, tuple) else arguments


def _from_samples(image: Image.Image, samples: NDArray[np.uint16]) -> Picture:
    """Take 16-bit samples that were put together by hand."""
    scaled = samples.astype(np.float32) / np.float32(65535)
    grey = image.mode == "LA"
    colour = np.repeat(scaled[..., :1], 3, axis=2) if grey else np.ascontiguousarray(scaled[..., :3])
    alpha = scaled[..., -1].copy() if image.mode in ("RGBA", "LA") else keyed_alpha(image, scaled)
    return Picture(colour, alpha=alpha, grey=grey, bits=16)
