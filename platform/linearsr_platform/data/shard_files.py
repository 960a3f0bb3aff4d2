"""Shards as local, indexed files: those on this machine where they are, others through a cache or as an unnamed copy. Imports no torch."""

import weakref
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from linearsr_platform import storage
from linearsr_platform.data.cache import CachedFile, ShardCache
from linearsr_platform.data.tar_index import BadTarError, Entry, TarIndex
from linearsr_platform.errors import StageError
from linearsr_platform.remote import passes

LOCAL_KEPT = 64
"""Shards on this machine whose headers are remembered; some 300 kB for 1000 samples."""


class ShardAwayError(ConnectionError):
    """A shard could not be had from its store just now, which says nothing against the shard: a training is worth another start."""


class Shard:
    """One open shard. What it maps stays readable, and its place in the cache taken, until nothing refers to it any more."""

    def __init__(self, url: str, index: TarIndex, held: CachedFile | None = None) -> None:
        """Keep an index under the shard's name, and with it the file in the cache that it maps."""
        self.url = url
        self._index = index
        self._held = held

    @property
    def entries(self) -> list[Entry]:
        """Its samples, in their order."""
        return self._index.entries

    def view(self, entry: Entry, member: str) -> memoryview:
        """Return the content of one of a sample's members, uncopied; good as long as somebody has this shard."""
        return self._index.view(entry.members[member])


class ShardFiles:
    """Opens shards and remembers the last ones, so that nobody reads headers twice."""

    def __init__(self, cache: ShardCache | None = None, *, remote_kept: int = 1) -> None:
        """Open nothing yet.

        Args:
            cache: for shards that are not on this machine; without one each is downloaded whenever it is opened.
            remote_kept: how many of those stay open though nobody uses them: they take room in the cache.
        """
        self._cache = cache
        self._kept: dict[bool, OrderedDict[str, Shard]] = {True: OrderedDict(), False: OrderedDict()}
        self._limits = {True: LOCAL_KEPT, False: remote_kept}
        # Others may still hold what this has forgotten.
        self._alive: weakref.WeakValueDictionary[str, Shard] = weakref.WeakValueDictionary()

    def open(self, url: str) -> Shard:
        """Return a shard, ready to be read.

        Raises:
            StageError: if it is missing, cut off or no tar; the message names it.
            ShardAwayError: if its store does not answer.
        """
        local = storage.is_local(url)
        kept = self._kept[local]
        shard = kept.pop(url, None) or self._alive.get(url)
        if shard is None:
            while len(kept) >= self._limits[local]:
                kept.popitem(last=False)
            shard = open_shard(url, self._cache)
        kept[url] = self._alive[url] = shard
        return shard

    def prefetch(self, url: str) -> None:
        """Begin to fetch a shard that will be needed, in the background, if it is not on this machine."""
        if self._cache is not None and not storage.is_local(url) and url not in self._alive:
            self._cache.prefetch(url)

    def close(self) -> None:
        """Forget all shards and stop fetching."""
        for kept in self._kept.values():
            kept.clear()
        if self._cache is not None:
            self._cache.close()


def open_shard(url: str, cache: ShardCache | None = None) -> Shard:
    """Open one shard, through the cache if it is not on this machine.

    Raises:
        StageError: if it is missing, cut off or no tar; the message names it.
        ShardAwayError: if its store does not answer, also not after the tries of `linearsr_platform.remote`.
    """
    try:
        if cache is not None and not storage.is_local(url):
            held = cache.open(url)
            return Shard(url, TarIndex(held.path), held)
        # A mapped file lives on without a name, so nothing of a copy is left behind whatever happens.
        with storage.local_path(url) as path:
            return Shard(url, TarIndex(Path(path)))
    except (OSError, BadTarError) as error:
        where, reason = f"shard {storage.shown(url)}", f"{type(error).__name__}: {storage.shown(str(error))}"
        if passes(error):
            # Not a StageError: that would end a training for good, where Ray Train's restarts may outlast the store's trouble.
            fix = "fix: run the same command again once it does"
            raise ShardAwayError(f"{where}: its store does not answer: {reason}; expected it to; {fix}") from error
        fix = "fix: write it again (its stage is `prepare`), or correct its name"
        raise StageError(f"{where}: cannot be read: {reason}; expected a WebDataset tar; {fix}") from error


def read_entries(url: str) -> Iterator[tuple[Shard, Entry]]:
    """Read the samples of one shard in their order, each with the shard that holds it.

    Raises:
        StageError: if it is missing, cut off or no tar.
        ShardAwayError: if its store does not answer.
    """
    shard = open_shard(url)
    for entry in shard.entries:
        yield shard, entry
