"""Which pictures of several folders belong together: those of one name, and every folder has every name."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from linearsr.picture_files import INPUT_SUFFIXES
from linearsr.pictures import DECODING_ERRORS, PictureError, read_picture
from linearsr_platform.errors import UserError
from linearsr_platform.stages.measuring import Photograph, Pixels

Kind = Literal["restored", "original", "lr"]
TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""
NAMED = 3
"""Names that an error lists; the others are counted."""


@dataclass(frozen=True, kw_only=True)
class PictureFiles:
    """The files of one photograph, read where it is measured."""

    name: str
    files: Mapping[Kind, Path]
    tags: tuple[str, ...] = field(default=())
    tags_of_lr: bool = False
    """See `Photograph`."""

    def load(self) -> Photograph:
        """Read every file as 8-bit sRGB.

        Raises:
            UserError: naming a file that cannot be read as a picture.
        """
        found: dict[Kind, Pixels] = {kind: _pixels(path) for kind, path in self.files.items()}
        return Photograph(
            name=self.name,
            original=found.get("original"),
            lr=found.get("lr"),
            restored=found.get("restored"),
            tags=self.tags,
            tags_of_lr=self.tags_of_lr,
        )


def match_by_name(
    folders: Mapping[Kind, Path], tags: Mapping[str, tuple[str, ...]] | None = None, lr_tags: Container[str] = ()
) -> list[PictureFiles]:
    """Return the photographs of some folders, in order of name.

    A name is a file's without its suffix. Nothing is guessed: `a.png` and `ax4.png` are two names.

    Args:
        folders: of the pictures of each kind.
        tags: what a model is told, by name.
        lr_tags: names of those whose tags are of the LR image.

    Raises:
        UserError: naming what is missing in a folder, has a name twice, or of no picture.
    """
    found = {kind: _by_name(kind, folder) for kind, folder in folders.items()}
    every = sorted({name for files in found.values() for name in files})
    for kind, files in found.items():
        missing = [name for name in every if name not in files]
        if missing:
            other = next(files[missing[0]] for files in found.values() if missing[0] in files)
            more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
            raise UserError(
                f"--{kind}: got no picture named {', '.join(map(repr, missing[:NAMED]))}{more} in {folders[kind]}, but {other}; "
                "expected the same names in every folder; fix: bring it, or take the other away"
            )
    words = tags or {}
    return [
        PictureFiles(
            name=name,
            files={kind: files[name] for kind, files in found.items()},
            tags=words.get(name, ()),
            tags_of_lr=name in lr_tags,
        )
        for name in every
    ]


def check_sizes(photographs: list[PictureFiles], scale: int | None) -> int | None:
    """Refuse pictures whose sizes do not fit together, by their headers.

    Args:
        photographs: all of them.
        scale: of the model; None finds out.

    Returns: output side over LR side; None where there are no LR pictures.

    Raises:
        UserError: naming the picture that does not fit or cannot be read.
    """
    for photograph in photographs:
        sizes = {kind: _size(path) for kind, path in photograph.files.items()}
        large: list[Kind] = [kind for kind in ("original", "restored") if kind in sizes]
        if len(large) == 2 and sizes["original"] != sizes["restored"]:
            told = f"{_shown(sizes['restored'])} px, and {_shown(sizes['original'])} of {photograph.files['original']}"
            raise UserError(f"{photograph.files['restored']}: got {told}; expected the original's size; fix: crop or restore it again")
        if "lr" not in sizes or not large:
            continue
        lr, full = sizes["lr"], sizes[large[0]]
        scale = scale or max(1, full[0] // lr[0])
        if full != (lr[0] * scale, lr[1] * scale):
            told = f"{_shown(full)} px, and {_shown(lr)} of {photograph.files['lr']}"
            raise UserError(f"{photograph.files[large[0]]}: got {told}; expected {scale} times the LR picture; fix: crop both alike")
    return scale


def largest_lr(photographs: Sequence[PictureFiles]) -> tuple[int, int] | None:
    """Return the (height, width) of the LR picture with the most pixels, by their headers; None without any.

    Raises:
        UserError: naming one that cannot be read.
    """
    sizes = [_size(one.files["lr"]) for one in photographs if "lr" in one.files]
    if not sizes:
        return None
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    return height, width


def _by_name(kind: Kind, folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"--{kind}: got {folder}; expected a folder of pictures")
    found: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in INPUT_SUFFIXES):
        if path.stem in found:
            raise UserError(f"--{kind}: got {found[path.stem].name} and {path.name} in {folder}; expected one picture of a name")
        found[path.stem] = path
    if not found:
        raise UserError(f"--{kind}: got {folder}, without pictures; expected files that end in {', '.join(INPUT_SUFFIXES)}")
    return found


def _size(path: Path) -> tuple[int, int]:
    """Return the (width, height) of a file as it is shown."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            return (height, width) if image.getexif().get(0x0112) in TURNED else (width, height)
    except DECODING_ERRORS as error:
        raise UserError(f"{path}: got a file that is no picture ({error}); expected one that can be read; fix: bring it again") from error


def _pixels(path: Path) -> Pixels:
    try:
        picture = read_picture(path)
    except PictureError as error:
        raise UserError(str(error)) from error
    pixels: Pixels = np.rint(picture.colour.clip(0, 1) * 255).astype(np.uint8)
    return pixels


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
