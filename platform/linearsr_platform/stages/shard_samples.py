"""The samples of a shard that is enlarged: which members are pictures, what they are called then, and what their JSON says of them."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from linearsr.picture_files import INPUT_SUFFIXES, output_suffix
from linearsr.pictures import PictureError
from linearsr.sizing import SizePlan
from linearsr_platform.data.members import read_object
from linearsr_platform.data.picture_shards import Members
from linearsr_platform.errors import StageError

KINDS_SHOWN = 10
"""Kinds of members that a message names."""
LATENT = "latent.npy"
"""The picture as `prepare` encodes it."""


def is_picture(name: str) -> bool:
    """Tell whether a member is a picture, by what follows the first dot of its file's name."""
    return f".{name}" in INPUT_SUFFIXES


def new_name(name: str) -> str:
    """Return what a sample's file is called in the new shard."""
    return output_suffix(f".{name}")[1:] if is_picture(name) else name


def check_names(sample: str, members: Members) -> None:
    """Refuse a sample in which two files would have one name.

    Raises:
        PictureError: naming both.
    """
    new = [new_name(name) for name in members]
    if twice := next((name for name in new if new.count(name) > 1), None):
        both = " and ".join(name for name in members if new_name(name) == twice)
        raise PictureError(f"{sample}: got {both}; expected one picture that becomes {twice}; fix: rename one of them")


def note_on_copied(kinds: Mapping[str, int]) -> str | None:
    """Say which members were copied though they end as pictures do; None if none was.

    Args:
        kinds: how many members a shard has of each name behind its key.
    """
    copied = {name: count for name, count in kinds.items() if name.endswith(INPUT_SUFFIXES) and not is_picture(name)}
    if not copied:
        return None
    return f"copied as they are: {_listed(copied)}; by the rules of WebDataset a suffix begins at the first dot of a name"


def nothing_enlarged(shard: str, kinds: Mapping[str, int]) -> StageError:
    """Return the error of a shard without pictures; see `note_on_copied`."""
    got = _listed(kinds) if kinds else "no members"
    return StageError(
        f"{shard}: got a shard without pictures ({got}); expected {', '.join(f'KEY{suffix}' for suffix in INPUT_SUFFIXES)}; "
        "fix: rename its members: a suffix begins at the first dot of a name"
    )


def corrected(members: dict[str, bytes], sizes: SizePlan) -> dict[str, bytes]:
    """Bring what a sample's own JSON says of its picture up to date, where it says it, and leave out the latent of the small one."""
    try:
        facts = read_object(members.get("json", b"null"))
    except ValueError:
        return members
    picture = next(content for name, content in members.items() if is_picture(name))
    new: dict[str, object] = {"width_px": sizes.output[0], "height_px": sizes.output[1], "sha256": hashlib.sha256(picture).hexdigest()}
    if (box := _box(facts.get("box"), sizes)) is not None:
        # `prepare` gives the size of the part that is used.
        new |= {"box": box, "width_px": box[2] - box[0], "height_px": box[3] - box[1]}
    kept = {name: content for name, content in members.items() if name != LATENT}
    if len(kept) < len(members):
        facts.pop("latent_codec", None)
    changed = {**facts, **{name: value for name, value in new.items() if name in facts}}
    return {**kept, "json": json.dumps(changed, sort_keys=True).encode()}


def _box(box: Any, sizes: SizePlan) -> list[int] | None:
    """Return left, top, right, bottom in pixels of the enlarged picture; None if that is not what a sample says."""
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(one, int) for one in box):
        return None
    return [round(one * sizes.output[place % 2] / sizes.given[place % 2]) for place, one in enumerate(box)]


def _listed(kinds: Mapping[str, int]) -> str:
    shown = [f"KEY.{name} ({count})" for name, count in Counter(kinds).most_common(KINDS_SHOWN)]
    return ", ".join([*shown, *(["..."] if len(kinds) > KINDS_SHOWN else [])])
