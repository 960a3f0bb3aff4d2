"""Test sets by name: where people get them, what is in them, and whether a copy is still what it was.

Nothing is downloaded or shipped. No publisher gives a hash, so the first copy that is added is trusted and its hash is recorded;
whoever compares numbers compares that hash.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Literal

from PIL import Image

from linearsr.pictures import DECODING_ERRORS
from linearsr_platform import storage
from linearsr_platform.data.images import SUFFIXES
from linearsr_platform.errors import UserError

MANIFEST = "test_sets.json"
VERSION = 1
STABLESR = "https://huggingface.co/datasets/Iceclear/StableSR-TestSets"
MARKS = re.compile(r"(?:_(?:LR|HR)\d?|_x[1-8]|x[2-8])$")
"""Ends of file names by which LR and HR of a pair differ in RealSR, DRealSR and DIV2K: `Canon_001_LR4`, `Canon_001_HR`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownTestSet:
    """What is public about a test set."""

    name: str
    aliases: tuple[str, ...] = ()
    """What people also call it, and its folder; case, `-` and `_` do not matter."""
    page: str
    """Where a person downloads it."""
    licence: str
    folder: str
    """What its folder is called, below the root of the test sets."""
    lr: tuple[str, ...]
    """Folder of the LR images inside it, the first that is there; "." is the folder itself."""
    hr: tuple[str, ...] = ()
    """Folder of the originals; none for a set without."""
    images: int
    """LR images that papers count."""
    scale: int = 4
    lr_px: int | None = None
    """Side of every LR image, if they are alike and square; originals are `scale` times as large."""
    sha256: str | None = None
    """Of its images as `hash_of` counts; None: nobody we know of has published or checked one."""


TEST_SETS: dict[str, KnownTestSet] = {
    one.name: one
    for one in (
        KnownTestSet(
            name="RealSR",
            aliases=("RealSRVal_crop128", "RealSR-val"),
            page=STABLESR,
            licence="S-Lab 1.0, not to be redistributed",
            folder="RealSRVal_crop128",
            lr=("test_LR",),
            hr=("test_HR",),
            images=100,
            lr_px=128,
        ),
        KnownTestSet(
            name="DRealSR",
            aliases=("DrealSRVal_crop128", "DRealSR-val"),
            page=STABLESR,
            licence="S-Lab 1.0, not to be redistributed",
            folder="DrealSRVal_crop128",
            lr=("test_LR",),
            hr=("test_HR",),
            images=93,
            lr_px=128,
        ),
        KnownTestSet(
            name="DIV2K-Val",
            aliases=("DIV2K_V2_val", "DIV2K"),
            page=STABLESR,
            licence="S-Lab 1.0, not to be redistributed",
            folder="DIV2K_V2_val",
            lr=("test_LR",),
            hr=("test_HR",),
            images=3000,
            lr_px=128,
        ),
        KnownTestSet(
            name="RealLQ250",
            page="https://drive.google.com/file/d/16uWuJOyGMw5fbXHGcl6GOmxYJb_Szrqe (from github.com/shallowdream204/DreamClear)",
            licence="see github.com/shallowdream204/DreamClear",
            folder="RealLQ250",
            lr=("lq", "test_LR", "."),
            images=250,
        ),
        KnownTestSet(
            name="RealLR200",
            page="https://drive.google.com/drive/folders/1L2VsQYQRKhWJxe6yWZU9FgBWSgBCk6mz (from github.com/cswry/SeeSR)",
            licence="see github.com/cswry/SeeSR",
            folder="RealLR200",
            lr=("test_LR", "lq", "."),
            images=200,
        ),
    )
}
"""Every test set by name."""


@dataclass(frozen=True, slots=True)
class Pair:
    """An image of a test set."""

    name: str
    """Common to both files, without suffix."""
    lr: Path
    hr: Path | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TestSet:
    """A test set on this machine, complete and unchanged."""

    known: KnownTestSet
    pairs: tuple[Pair, ...]
    """In order of name."""
    lr: Path
    hr: Path | None
    sha256: str
    """Of all images; travels with every number that is measured on them."""

    @property
    def name(self) -> str:
        """Its name in `TEST_SETS`."""
        return self.known.name


@dataclass(frozen=True, kw_only=True, slots=True)
class TestSetRecord:
    """What the manifest says of a test set that was added."""

    folder: str
    """Relative to the root if it is below it, else absolute."""
    images: int
    sha256: str
    date: str
    """Day it was added, ISO 8601."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Presence:
    """Whether a test set is here."""

    known: KnownTestSet
    state: Literal["ok", "changed", "not recorded", "absent"]
    images: int
    """Found, or recorded where it is absent or broken."""
    sha256: str
    detail: str


def known_test_set(name: str) -> KnownTestSet:
    """Look a test set up by its name or what people call it.

    Raises:
        UserError: if there is none of that name.
    """
    wanted = _plain(name)
    for one in TEST_SETS.values():
        if wanted in map(_plain, (one.name, *one.aliases)):
            return one
    raise UserError(f"test set: got {name!r}; expected one of {', '.join(TEST_SETS)}; fix: `linearsr test-sets list`")


def find_test_set(name: str, root: Path) -> TestSet:
    """Return a test set that was added under a root, after reading every byte of it again.

    Raises:
        UserError: if it is not there, was never added, lacks images or has others than when it was added.
    """
    known = known_test_set(name)
    record = read_records(root).get(known.name)
    if record is None:
        here = f"it is in {root / known.folder}, but was never added" if (root / known.folder).is_dir() else f"nothing of it in {root}"
        raise UserError(f"test set {known.name}: got {here}; expected it there; fix: {how_to_get(known, root)}")
    found = inspect(known, _folder(root, record))
    if found.sha256 != record.sha256:
        where = f"{_folder(root, record)}; expected {record.sha256}, recorded on {record.date}"
        again = f"`linearsr test-sets add {known.name} FOLDER` if the new images are meant"
        raise UserError(f"test set {known.name}: got images with SHA-256 {found.sha256} in {where}; fix: bring it again, or {again}")
    return found


def inspect(known: KnownTestSet, folder: Path) -> TestSet:
    """Read a copy of a test set, whole.

    Raises:
        UserError: if a folder is missing, the number or the sizes of images are others, or LR and HR do not pair.
    """
    lr_folder, hr_folder = _part(known, folder, known.lr), _part(known, folder, known.hr) if known.hr else None
    lr, hr = _images(known, lr_folder), None if hr_folder is None else _images(known, hr_folder)
    if len(lr) != known.images:
        raise UserError(
            f"test set {known.name}: got {len(lr)} images in {lr_folder}; expected {known.images}; fix: download all of {known.page}"
        )
    if hr is not None and lr.keys() != hr.keys():
        lone = sorted(lr.keys() ^ hr.keys())
        raise UserError(
            f"test set {known.name}: got {len(lone)} images in {folder} without a partner, such as {lone[0]!r}; expected the same names in "
            f"{lr_folder.name} and {known.hr[0]}, apart from endings like _LR4 and _HR; fix: download it again from {known.page}"
        )
    pairs = tuple(Pair(key, lr[key], None if hr is None else hr[key]) for key in sorted(lr))
    _check_sizes(known, pairs)
    return TestSet(known=known, pairs=pairs, lr=lr_folder, hr=hr_folder, sha256=hash_of(pairs))


def hash_of(pairs: Sequence[Pair]) -> str:
    """Return the SHA-256 over names and bytes of all images, wherever they lie: lines of `lr/NAME HASH` and `hr/NAME HASH`, sorted."""
    files = [("lr", pair.lr) for pair in pairs] + [("hr", pair.hr) for pair in pairs if pair.hr is not None]
    lines = sorted(f"{role}/{file.name} {_sha256(file)}\n" for role, file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def add_test_set(name: str, folder: Path, root: Path, today: date) -> TestSet:
    """Check a copy and record its hash in the manifest of the root; a record that was there is replaced.

    Raises:
        UserError: as `inspect`, or if the set's published hash is another.
    """
    known = known_test_set(name)
    found = inspect(known, folder)
    if known.sha256 is not None and found.sha256 != known.sha256:
        raise UserError(
            f"test set {known.name}: got SHA-256 {found.sha256}; expected {known.sha256}; fix: download it again from {known.page}"
        )
    inside = folder.resolve().is_relative_to(root.resolve())
    where = folder.resolve().relative_to(root.resolve()).as_posix() if inside else str(folder.resolve())
    record = TestSetRecord(folder=where, images=len(found.pairs), sha256=found.sha256, date=today.isoformat())
    records = {**read_records(root), known.name: record}
    content = {"version": VERSION, "test_sets": {one: asdict(records[one]) for one in sorted(records)}}
    storage.write_json(str(root / MANIFEST), content)
    return found


def presence_of(known: KnownTestSet, root: Path, records: Mapping[str, TestSetRecord]) -> Presence:
    """Say whether a test set is under a root, reading every byte of one that was added."""
    record = records.get(known.name)
    if record is None:
        here = (root / known.folder).is_dir()
        return Presence(known=known, state="not recorded" if here else "absent", images=0, sha256="", detail=known.page)
    if not _folder(root, record).is_dir():
        detail = f"added on {record.date}, and no longer in {_folder(root, record)}"
        return Presence(known=known, state="absent", images=record.images, sha256=record.sha256, detail=detail)
    try:
        found = find_test_set(known.name, root)
    except UserError as error:
        return Presence(known=known, state="changed", images=record.images, sha256=record.sha256, detail=str(error))
    return Presence(known=known, state="ok", images=len(found.pairs), sha256=found.sha256, detail=f"added on {record.date}")


def read_records(root: Path) -> dict[str, TestSetRecord]:
    """Return what was added under a root, by name.

    Raises:
        UserError: if the manifest cannot be read.
    """
    file = root / MANIFEST
    if not file.is_file():
        return {}
    content = storage.read_json(str(file))
    try:
        if not isinstance(content, dict) or content["version"] != VERSION:
            raise ValueError("another version")
        return {str(name): TestSetRecord(**fields) for name, fields in content["test_sets"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{file}: got {error}; expected what `linearsr test-sets add` writes; fix: delete it and add the sets again"
        ) from error


def how_to_get(known: KnownTestSet, root: Path) -> str:
    """Say how a test set gets where it is looked for."""
    inner = " and ".join(f"{parts[0]}/" for parts in (known.lr, known.hr) if parts and parts[0] != ".")
    layout = f"{root / known.folder}/ with {known.images} images" + (f" in {inner}" if inner else "")
    command = f"linearsr test-sets add {known.name} {root / known.folder} --root {root}"
    return f"download it from {known.page} ({known.licence}) into {layout}, then `{command}`"


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _folder(root: Path, record: TestSetRecord) -> Path:
    return root / record.folder


def _part(known: KnownTestSet, folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    expected = " or ".join(f"{name}/" for name in names)
    raise UserError(
        f"test set {known.name}: got no {expected} in {folder}; expected it; fix: name the folder that holds it, from {known.page}"
    )


def _images(known: KnownTestSet, folder: Path) -> dict[str, Path]:
    """Return images directly inside a folder by what names a pair: without suffix and endings such as `_LR4`."""
    files = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    )
    marked = {MARKS.sub("", path.stem): path for path in files} if known.hr else {}
    # Where endings alone tell two images apart, they are part of the name.
    found = marked if len(marked) == len(files) else {path.stem: path for path in files}
    if len(found) != len(files):
        raise UserError(
            f"test set {known.name}: got two images of one name in {folder}; expected one file each; fix: remove what is not its"
        )
    return found


def _check_sizes(known: KnownTestSet, pairs: Sequence[Pair]) -> None:
    for pair in pairs:
        low, high = _size(known, pair.lr), None if pair.hr is None else _size(known, pair.hr)
        if known.lr_px is not None and low != (known.lr_px, known.lr_px):
            raise UserError(f"test set {known.name}: {pair.lr}: got {low[0]}x{low[1]} px; expected {known.lr_px}x{known.lr_px}")
        if high is not None and high != (low[0] * known.scale, low[1] * known.scale):
            raise UserError(f"test set {known.name}: {pair.hr}: got {high[0]}x{high[1]} px; expected {known.scale} times {low[0]}x{low[1]}")


def _size(known: KnownTestSet, file: Path) -> tuple[int, int]:
    try:
        with Image.open(file) as image:
            return image.size
    except DECODING_ERRORS as error:
        raise UserError(
            f"test set {known.name}: {file}: got {error}; expected an image; fix: download it again from {known.page}"
        ) from error


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
