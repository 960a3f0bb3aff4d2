"""WebDataset shards as they come: every member of every sample, read and written with the same keys."""

import tarfile
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO

from linearsr_platform import storage
from linearsr_platform.data.shard_files import read_entries

Members = Mapping[str, bytes]
"""Content of a sample's files by what follows the key and its dot, in lower case: `png`, `json`, `seg.png`."""


def read_members(url: str) -> Iterator[tuple[str, Members]]:
    """Read the samples of a shard, local or remote: key and members, in their order.

    Raises:
        StageError: if the shard is missing, cut off or no tar; the message names it.
        ShardAwayError: if its store does not answer.
    """
    for shard, entry in read_entries(url):
        yield entry.key, {name: bytes(shard.view(entry, name)) for name in entry.members}


def write_members(url: str, samples: Iterable[tuple[str, Members]]) -> int:
    """Write a shard at once and return its samples; the same samples give the same file."""
    count = 0
    with storage.atomic_file(url) as path, tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, members in samples:
            for name, content in members.items():
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(content)
                tar.addfile(info, BytesIO(content))
            count += 1
    return count
