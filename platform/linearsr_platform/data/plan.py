"""Decide what becomes of each photograph before anything is written: which are refused, and which part goes to which split."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from linearsr_platform import storage
from linearsr_platform.data.images import BadImageError, Decoded, decode_image, sharpness
from linearsr_platform.data.manifest import Quarantined
from linearsr_platform.data.sources import Candidate
from linearsr_platform.errors import StageError, UserError
from linearsr_platform.recipe.data_schema import DataConfig

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are outside."""

MAX_KEY_LENGTH = 80
"""Characters of a sample's key; a tar header has room for 100 with the suffix."""


@dataclass(frozen=True, slots=True)
class Photo:
    """A photograph that passed all checks. Pixels are counted upright and after halving."""

    candidate: Candidate
    width_px: int
    height_px: int
    pixels_sha256: str
    lossless: bool
    sharpness: float


@dataclass(frozen=True, slots=True)
class Cut:
    """A sample to be written: a photograph or a part of it."""

    key: str
    photo: Photo
    box: Box | None = None
    """The part; None is the whole."""


def load_photo(candidate: Candidate, config: DataConfig) -> Decoded:
    """Read and decode one candidate.

    Raises:
        BadImageError: if it cannot be used.
        StageError: if the connection to its store broke, which says nothing about the image.
    """
    try:
        content = storage.read_bytes(candidate.url)
    except (ConnectionError, TimeoutError) as error:
        raise StageError(f"{candidate.url}: the connection failed: {error}; fix: run the stage again") from error
    except OSError as error:
        raise BadImageError(f"cannot be read: {error.strerror or error}") from error
    return decode_image(content, halve_jpeg=config.sources[candidate.source].halve_jpeg)


def pixels_hash(decoded: Decoded) -> str:
    """Return the sha256 of shape and pixels: the same picture in another file format has the same."""
    return hashlib.sha256(str(decoded.pixels.shape).encode() + decoded.pixels.tobytes()).hexdigest()


def is_held_out(candidate: Candidate, config: DataConfig) -> bool:
    """Tell whether a photograph must never be trained on."""
    return candidate.label.held_out or candidate.stem in config.held_out


def inspect(
    candidates: Sequence[Candidate], config: DataConfig, on_file: Callable[[int, str], None]
) -> tuple[list[Photo], list[Quarantined]]:
    """Decode every candidate once; returns those that can be used, and those that cannot with the reason.

    Of several copies of one picture the first is kept, and a held-out copy before any other, so that none is trained on.

    Args:
        candidates: image files.
        config: for `min_side_px`, `held_out` and each source's `halve_jpeg`.
        on_file: called with the number of files done and the name of the next.
    """
    photos: list[Photo] = []
    refused: list[Quarantined] = []
    first_of: dict[str, str] = {}
    for done, candidate in enumerate(sorted(candidates, key=lambda one: not is_held_out(one, config))):
        on_file(done, candidate.name)
        try:
            photo = _checked(candidate, config)
            first = first_of.setdefault(photo.pixels_sha256, candidate.name)
            if first != candidate.name:
                raise BadImageError(f"the same picture as {first}")
            photos.append(photo)
        except BadImageError as bad:
            refused.append(Quarantined(candidate.name, str(bad)))
    order = {candidate.name: position for position, candidate in enumerate(candidates)}
    return sorted(photos, key=lambda photo: order[photo.candidate.name]), sorted(refused, key=lambda one: order[one.file])


def split_photos(photos: Sequence[Photo], config: DataConfig, min_shards: int) -> dict[str, list[Cut]]:
    """Share photographs out to `train`, `validation`, `high-quality` (a part of train) and `held-out`.

    A strip `validation_px` wide is cut off the right, or the lower, end of every training photograph that is at least twice
    as long and as wide as the strip; training sees only the rest.

    Raises:
        UserError: if no photograph is left for training, or none is large enough for a validation strip.
    """
    keys = make_keys([photo.candidate for photo in photos])
    splits: dict[str, list[Cut]] = {"train": [], "validation": [], "high-quality": [], "held-out": []}
    for key, photo in zip(keys, photos, strict=True):
        boxes = cut_strip(photo.width_px, photo.height_px, config)
        if is_held_out(photo.candidate, config):
            splits["held-out"].append(Cut(key, photo))
        elif boxes is None:
            splits["train"].append(Cut(key, photo))
        else:
            splits["train"].append(Cut(key, photo, boxes[0]))
            splits["validation"].append(Cut(key, photo, boxes[1]))
    if len(splits["train"]) < min_shards:
        got = f"data.sources: got {len(splits['train'])} photographs to train on"
        raise UserError(f"{got}; expected at least {min_shards}, one for each worker; fix: add photographs, or lower `workers`")
    if config.validation_px and not splits["validation"]:
        longest = max(max(cut.photo.width_px, cut.photo.height_px) for cut in splits["train"])
        got = f"data.validation_px: got {config.validation_px}, but the longest training photograph has {longest} px"
        raise UserError(f"{got}; expected one twice as long; fix: a smaller data.validation_px, larger photographs, or halve_jpeg: false")
    splits["high-quality"] = best_cuts(splits["train"], min_shards)
    return splits


def cut_strip(width_px: int, height_px: int, config: DataConfig) -> tuple[Box, Box] | None:
    """Return the boxes of what stays for training and of the validation strip; None if the photograph is too small."""
    strip, longer, shorter = config.validation_px, max(width_px, height_px), min(width_px, height_px)
    if not strip or shorter < strip or longer - strip < max(strip, config.min_side_px):
        return None
    if width_px >= height_px:
        return (0, 0, width_px - strip, height_px), (width_px - strip, 0, width_px, height_px)
    return (0, 0, width_px, height_px - strip), (0, height_px - strip, width_px, height_px)


def best_cuts(train: Sequence[Cut], min_shards: int) -> list[Cut]:
    """Return the training samples marked `high`; if none is, the better half, and at least `min_shards` of them.

    Better are lossless files, then sharper ones (see `images.sharpness`).
    """
    marked = [cut for cut in train if cut.photo.candidate.label.high_quality]
    if marked:
        return marked
    ranked = sorted(train, key=lambda cut: (not cut.photo.lossless, -cut.photo.sharpness, cut.key))
    best = {cut.key for cut in ranked[: max((len(train) + 1) // 2, min_shards)]}
    return [cut for cut in train if cut.key in best]


def make_keys(candidates: Sequence[Candidate]) -> list[str]:
    """Return a key for each candidate: source and path without suffix, in characters that are safe in a tar.

    Candidates whose keys would be the same get a part of their name's sha256.
    """
    paths = [f"{one.source}-{one.file.rpartition('.')[0].replace('/', '-')}" for one in candidates]
    plain = [re.sub(r"[^A-Za-z0-9_-]+", "_", path)[:MAX_KEY_LENGTH] for path in paths]
    count = Counter(plain)
    marks = [hashlib.sha256(one.name.encode()).hexdigest()[:8] for one in candidates]
    return [key if count[key] == 1 else f"{key}-{mark}" for key, mark in zip(plain, marks, strict=True)]


def _checked(candidate: Candidate, config: DataConfig) -> Photo:
    """Decode a candidate and measure it, or raise `BadImageError`."""
    if candidate.problem:
        raise BadImageError(candidate.problem)
    decoded = load_photo(candidate, config)
    height, width = decoded.pixels.shape[:2]
    if min(height, width) < config.min_side_px:
        raise BadImageError(f"{width}x{height} px is smaller than data.min_side_px {config.min_side_px}")
    return Photo(candidate, width, height, pixels_hash(decoded), decoded.lossless, sharpness(decoded.pixels))
