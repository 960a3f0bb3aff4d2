"""The manifest of a folder of weights: what each file is, where it came from, and the hash it had when it came."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from linearsr_platform import storage
from linearsr_platform.errors import UserError

FILE = "manifest.json"
VERSION = 1
LEVELS = 4
"""How far above a file its manifest may be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsRecord:
    """A file that `linearsr prefetch` has brought or found right."""

    bytes: int
    sha256: str
    source: str
    """URL, path or hub id with revision that it came from; "" if it was there before."""
    licence: str
    needed_by: tuple[str, ...]
    date: str
    """Day it came, ISO 8601."""


def read_manifest(folder: Path) -> dict[str, WeightsRecord]:
    """Return what is recorded, by path below the folder with `/`; nothing if there is no manifest.

    Raises:
        UserError: if it is not one of ours.
    """
    try:
        content = json.loads((folder / FILE).read_bytes())
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}")
        return {name: _record(fields) for name, fields in content["files"].items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, RecursionError, TypeError, AttributeError) as error:
        got = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{folder / FILE}: got {got}; expected what `linearsr prefetch` writes; fix: move it away and run that again"
        ) from error


def _record(fields: Mapping[str, object]) -> WeightsRecord:
    known = {name: fields[name] for name in WeightsRecord.__dataclass_fields__}
    needed_by = known["needed_by"]
    if not isinstance(known["bytes"], int) or not isinstance(known["sha256"], str) or not isinstance(needed_by, list):
        raise TypeError(f"a record with {known}")
    return WeightsRecord(**{**known, "needed_by": tuple(map(str, needed_by))})  # type: ignore[arg-type]


def write_manifest(folder: Path, records: Mapping[str, WeightsRecord]) -> None:
    """Write the manifest, whole, in order of path."""
    files = {name: asdict(records[name]) for name in sorted(records)}
    storage.write_json(str(folder / FILE), {"version": VERSION, "files": files})


def find_record(file: Path) -> WeightsRecord | None:
    """Return what the manifest beside a file, or in a folder above it, says of the file; None if none does.

    Manifests of other things, such as data sets, are passed over.
    """
    for folder in list(file.parents)[:LEVELS]:
        with suppress(UserError):
            record = read_manifest(folder).get(file.relative_to(folder).as_posix())
            if record is not None:
                return record
    return None


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
