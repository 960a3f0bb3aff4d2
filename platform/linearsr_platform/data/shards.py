"""Write samples as uncompressed `.tar` shards that depend on nothing but the samples."""

import hashlib
import json
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from io import BytesIO

import numpy as np
from numpy.typing import NDArray

from linearsr_platform import storage
from linearsr_platform.data.images import Pixels, encode_png
from linearsr_platform.data.manifest import ShardInfo, file_hash


@dataclass(frozen=True, slots=True)
class Sample:
    """A named picture with what is known about it."""

    key: str
    pixels: Pixels
    """(H, W, 3) RGB."""
    meta: dict[str, object]
    """Written as `KEY.json`; JSON-able."""
    arrays: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    """Each written as `KEY.NAME.npy`."""
    jpeg: bytes | None = None
    """A JPEG file, in upright position, to be stored instead of a PNG of `pixels`; they are the part of it that `box` says."""
    box: tuple[int, int, int, int] | None = None
    """Left, top, right, bottom of `pixels` in `jpeg`; None is the whole."""


def write_shard(folder: str, name: str, samples: Iterable[Sample]) -> ShardInfo:
    """Write `folder`/`name` at once: `KEY.png` or `KEY.jpg`, `KEY.json` and arrays of each sample, `sha256` being that of the picture.

    `width_px` and `height_px` are those of the pixels to use: where only a part of a JPEG is, `box` says which.

    Returns: size and hash, with the last part of `folder` and `name` as path.
    """
    count = 0
    with storage.atomic_file(storage.join(folder, name)) as path:
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                picture, suffix = (encode_png(sample.pixels), "png") if sample.jpeg is None else (sample.jpeg, "jpg")
                height_px, width_px = sample.pixels.shape[:2]
                facts: dict[str, object] = {"width_px": width_px, "height_px": height_px, "sha256": hashlib.sha256(picture).hexdigest()}
                if sample.jpeg is not None and sample.box is not None:
                    facts["box"] = list(sample.box)
                _add(tar, f"{sample.key}.{suffix}", picture)
                _add(tar, f"{sample.key}.json", json.dumps({**sample.meta, **facts}, sort_keys=True).encode())
                for array_name, array in sorted(sample.arrays.items()):
                    buffer = BytesIO()
                    np.save(buffer, array, allow_pickle=False)
                    _add(tar, f"{sample.key}.{array_name}.npy", buffer.getvalue())
                count += 1
        return ShardInfo(f"{storage.name_of(folder)}/{name}", count, path.stat().st_size, file_hash(str(path)))


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a member; TarInfo's own owner, mode and time (0) are the same everywhere."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, BytesIO(content))
