"""EXIF of a picture that changes its size and its orientation. Imports no torch."""

from typing import Any

from PIL import Image
from PIL.ExifTags import IFD, Base

_PHOTOSHOP_LAYERS = 37724
STRUCTURE = frozenset(
    {
        Base.ImageWidth, Base.ImageLength, Base.BitsPerSample, Base.Compression, Base.PhotometricInterpretation, Base.StripOffsets,
        Base.SamplesPerPixel, Base.RowsPerStrip, Base.StripByteCounts, Base.PlanarConfiguration, Base.TileWidth, Base.TileLength,
        Base.TileOffsets, Base.TileByteCounts, Base.ExtraSamples, Base.SampleFormat, Base.Predictor, Base.ColorMap, Base.FillOrder,
        Base.JpegIFOffset, Base.JpegIFByteCount, Base.Orientation, Base.InterColorProfile, Base.XMLPacket, Base.SubIFDs, Base.JPEGTables,
        Base.IPTCNAA, Base.ImageResources, Base.NewSubfileType, Base.SubfileType, _PHOTOSHOP_LAYERS,
    }
)  # fmt: skip
"""Tags that say how the old file was stored: in a TIFF they stand among those that say what it shows."""


def carried_exif(image: Image.Image) -> bytes | None:
    """Return the EXIF of an opened picture as the enlarged one is to have it, or None if there is none.

    Orientation and the size become those of the new file (absent, which means upright), the thumbnail is left out.
    """
    old = image.getexif()
    if not old:
        return None
    new = Image.Exif()
    for tag, value in old.items():
        if tag not in STRUCTURE and tag not in (IFD.Exif, IFD.GPSInfo, IFD.Interop):
            new[tag] = _as_read(value)
    for folder in (IFD.Exif, IFD.GPSInfo):
        values = {tag: _as_read(value) for tag, value in old.get_ifd(folder).items()}
        for tag in (Base.ExifImageWidth, Base.ExifImageHeight, IFD.Interop):
            values.pop(tag, None)
        if values:
            new.get_ifd(folder).update(values)
            new[folder] = values
    return new.tobytes() if len(new) else None


class _Text(str):
    """Text of EXIF, written as the bytes that it was read from: Pillow reads them as Latin-1, and writes ASCII and question marks."""

    __slots__ = ()

    def encode(self, encoding: str = "latin-1", errors: str = "strict") -> bytes:
        """Return the bytes, whatever encoding is asked for."""
        return super().encode("latin-1", errors)


def _as_read(value: Any) -> Any:
    return _Text(value) if isinstance(value, str) else value
