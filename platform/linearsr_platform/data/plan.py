"""Decide what becomes of each photograph before anything is written: which are refused, and which part goes to which split."""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from typing import Any

from linearsr_platform import storage
from linearsr_platform.data.executor import Choose, OnProgress
from linearsr_platform.data.images import BadImageError, Decoded, decode_image, sharpness
from linearsr_platform.data.manifest import Quarantined
from linearsr_platform.data.records import folder_of, read_records, write_record
from linearsr_platform.data.sources import Candidate, away, is_away
from linearsr_platform.errors import StageError, UserError
from linearsr_platform.recipe.data_schema import DataConfig
from linearsr_platform.recipe.identity import stable_hash

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are outside."""

MAX_KEY_LENGTH = 80
"""Characters of a sample's key; a tar header has room for 100 with the suffix."""
PIECES = 64
"""Pieces of work that a few images are shared out to at most, so that progress shows."""
IMAGES_A_PIECE = 64
"""Images that one piece of work inspects at most: some seconds of one CPU."""
FACTS = 1
"""Version of what an inspection finds out; records of another one are not used."""
INSPECTED = "inspected-"
"""What the names of its records begin with."""
UNREADABLE = "cannot be read: "
"""How the reason of a file begins that could not be read at all."""
DUPLICATE = "the same picture as "
"""How the reason of a duplicate begins."""


@dataclass(frozen=True, slots=True)
class Photo:
    """A photograph that passed all checks. Pixels are counted upright and after halving."""

    candidate: Candidate
    width_px: int
    height_px: int
    pixels_sha256: str
    lossless: bool
    sharpness: float
    verbatim: bool = False
    """Whether the file may be stored as it is; see `Decoded.verbatim`."""

    @property
    def facts(self) -> dict[str, Any]:
        """What decoding it brought to light, as JSON."""
        content = asdict(self)
        del content["candidate"]
        return content


@dataclass(frozen=True, slots=True)
class Inspection:
    """Candidates that one piece of work looks at, with what names what is known about each."""

    candidates: tuple[Candidate, ...]
    digests: tuple[str, ...]

    @property
    def name(self) -> str:
        """First and last of its images."""
        return f"images {self.candidates[0].name} to {self.candidates[-1].name}"


@dataclass(frozen=True, slots=True)
class Cut:
    """A sample to be written: a photograph or a part of it."""

    key: str
    photo: Photo
    box: Box | None = None
    """The part; None is the whole."""

    @property
    def size_px(self) -> tuple[int, int]:
        """Width and height."""
        if self.box is None:
            return self.photo.width_px, self.photo.height_px
        left, top, right, bottom = self.box
        return right - left, bottom - top


def load_photo(candidate: Candidate, config: DataConfig) -> Decoded:
    """Read and decode one candidate.

    Raises:
        BadImageError: if it cannot be used.
        StageError: if the connection to its store broke, which says nothing about the image.
    """
    return decode_image(load_bytes(candidate), halve_jpeg=config.sources[candidate.source].halve_jpeg)


def load_bytes(candidate: Candidate) -> bytes:
    """Read one candidate; raises as `load_photo` does."""
    try:
        return candidate.read()
    except OSError as error:
        if is_away(candidate.url, error):
            raise away(candidate.url, error) from error
        raise BadImageError(f"{UNREADABLE}{error.strerror or error}") from error


def pixels_hash(decoded: Decoded) -> str:
    """Return the sha256 of shape and pixels: the same picture in another file format has the same."""
    return hashlib.sha256(str(decoded.pixels.shape).encode() + decoded.pixels.tobytes()).hexdigest()


def is_held_out(candidate: Candidate, config: DataConfig) -> bool:
    """Tell whether a photograph must never be trained on."""
    return candidate.label.held_out or candidate.stem in config.held_out


def inspect(
    candidates: Sequence[Candidate], config: DataConfig, output_url: str, choose: Choose, report: OnProgress
) -> tuple[list[Photo], list[Quarantined]]:
    """Decode every candidate once; returns those that can be used, and those that cannot with the reason.

    Of several copies of one picture the first is kept, and a held-out copy before any other, so that none is trained on. What an
    interrupted run below `output_url` found out about files that are the same since is taken from its records.

    Args:
        candidates: image files.
        config: for `min_side_px`, `held_out` and each source's `halve_jpeg`.
        output_url: where records are kept.
        choose: who does the work.
        report: told about every finished piece.
    """
    folder = folder_of(output_url)
    digests = [_digest(candidate, config) for candidate in candidates]
    known: dict[str, Any] = {}
    for record in read_records(folder, INSPECTED).values():
        known |= record
    todo = [position for position, digest in enumerate(digests) if digest not in known]
    size = min(max(ceil(len(todo) / PIECES), 1), IMAGES_A_PIECE)
    groups = [todo[start : start + size] for start in range(0, len(todo), size)]
    pieces = [Inspection(tuple(candidates[i] for i in group), tuple(digests[i] for i in group)) for group in groups]
    done = len(candidates) - len(todo)
    resumed = f", resumed: {done} of {len(candidates)} were checked" if done else ""
    report(done, len(candidates), f"checking photographs{resumed}")
    for piece, facts in choose(len(todo)).map_unordered(partial(inspect_piece, config=config, folder=folder), pieces):
        _refuse_unseen(pieces[piece].candidates, facts)
        known |= dict(zip(pieces[piece].digests, facts, strict=True))
        done += len(facts)
        report(done, len(candidates), "checking photographs")
    return _sort_out(candidates, [known[digest] for digest in digests], config)


def inspect_piece(piece: Inspection, *, config: DataConfig, folder: str) -> list[dict[str, Any]]:
    """Decode some candidates: the facts of a `Photo` or the reason, `refused`, of each; leaves a record of them."""
    facts: list[dict[str, Any]] = []
    for candidate in piece.candidates:
        try:
            facts.append(_checked(candidate, config).facts)
        except BadImageError as bad:
            facts.append({"refused": str(bad)})
    # What could not be read may be there when the stage runs again.
    lasting = {
        digest: found for digest, found in zip(piece.digests, facts, strict=True) if not found.get("refused", "").startswith(UNREADABLE)
    }
    write_record(folder, INSPECTED + stable_hash(list(piece.digests))[:16], lasting)
    return facts


def _digest(candidate: Candidate, config: DataConfig) -> str:
    """Return what names the facts about a candidate: another file, or another question, has another."""
    where = [candidate.url, candidate.span, candidate.stamp, candidate.problem]
    return stable_hash([FACTS, where, config.min_side_px, config.sources[candidate.source].halve_jpeg])


def _refuse_unseen(candidates: Sequence[Candidate], facts: Sequence[Mapping[str, Any]]) -> None:
    """Raise if a worker cannot read a file that is there for this process: it would be missing from the data without a word."""
    for candidate, found in zip(candidates, facts, strict=True):
        if found.get("refused", "").startswith(f"{UNREADABLE}No such file") and storage.exists(candidate.url):
            raise StageError(
                f"{candidate.url}: a worker of the cluster does not see it; expected sources that every machine sees; "
                "fix: move it to shared storage, or raise data.parallel_from, if neither text encoder nor DC-AE has to work on them"
            )


def _sort_out(
    candidates: Sequence[Candidate], facts: Sequence[Mapping[str, Any]], config: DataConfig
) -> tuple[list[Photo], list[Quarantined]]:
    """Tell photographs from refused files and later copies, both in the order of the candidates."""
    photos: dict[int, Photo] = {}
    refused: dict[int, Quarantined] = {}
    first_of: dict[str, str] = {}
    for position in sorted(range(len(candidates)), key=lambda one: not is_held_out(candidates[one], config)):
        candidate, found = candidates[position], facts[position]
        if "refused" in found:
            refused[position] = Quarantined(candidate.name, found["refused"])
            continue
        first = first_of.setdefault(found["pixels_sha256"], candidate.name)
        if first == candidate.name:
            photos[position] = Photo(candidate=candidate, **found)
        else:
            refused[position] = Quarantined(candidate.name, f"{DUPLICATE}{first}")
    return [photos[position] for position in sorted(photos)], [refused[position] for position in sorted(refused)]


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
    # 64 bits: of 100,000 names that no letter is left of, 32 would give two the same mark.
    marks = [hashlib.sha256(one.name.encode()).hexdigest()[:16] for one in candidates]
    return [key if count[key] == 1 else f"{key[: MAX_KEY_LENGTH - 17]}-{mark}" for key, mark in zip(plain, marks, strict=True)]


def _checked(candidate: Candidate, config: DataConfig) -> Photo:
    """Decode a candidate and measure it, or raise `BadImageError`."""
    if candidate.problem:
        raise BadImageError(candidate.problem)
    decoded = load_photo(candidate, config)
    height, width = decoded.pixels.shape[:2]
    if min(height, width) < config.min_side_px:
        raise BadImageError(f"{width}x{height} px is smaller than data.min_side_px {config.min_side_px}")
    return Photo(candidate, width, height, pixels_hash(decoded), decoded.lossless, sharpness(decoded.pixels), decoded.verbatim)
