"""Read shards back: all images at once, or an endless, resumable stream of batches of training crops."""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from linearsr_platform import storage
from linearsr_platform.data.batches import Arrays, BatchLayout, BatchMemory, CropMaker, Transform, place
from linearsr_platform.data.crop_pool import AHEAD, SPARE, CropPool, pickled
from linearsr_platform.data.crop_worker import WorkerSpec, make_files
from linearsr_platform.data.lanes import Crop, CropPlan, Lanes, lanes_of
from linearsr_platform.data.samples import RawSample, caption_of, read_images, read_shard
from linearsr_platform.data.sequence import CropSequence, State
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.data_schema import ShardCacheConfig

__all__ = ["CropReader", "Lanes", "RawSample", "Trace", "Transform", "caption_of", "lanes_of", "read_images", "read_shard"]

Trace = Callable[[str, int, int], None]
"""Takes the key, the epoch and the number of the draw of every crop that is handed out, in order."""


class CropReader:
    """An endless iterator of the micro-batches of one rank; its results depend on neither ranks nor loader workers.

    All ranks together read the one sequence of global batches that the run's lanes define (`linearsr_platform.data.sequence`).

    Args:
        shard_urls: of all ranks, in the same order everywhere.
        transform: makes an example; picklable if there are workers.
        batch_size: crops of one micro-batch of this rank.
        crops_per_image: crops taken from an image each time it is read.
        seed: of order and crops.
        rank: number of this rank.
        world_size: number of ranks.
        accumulation: micro-batches of an optimizer step; matters only where `lanes` are not the present ranks.
        lanes: of the run, from `lanes_of`; None starts a run, with a lane for each rank.
        workers: processes that make batches ahead; 0 makes them here, when they are asked for.
        cache: where remote shards are kept on this machine; None downloads one whenever it is opened.
        trace: told of every crop that is handed out.
    """

    def __init__(
        self,
        shard_urls: Sequence[str],
        transform: Transform,
        *,
        batch_size: int,
        crops_per_image: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        lanes: Lanes | None = None,
        workers: int = 0,
        cache: ShardCacheConfig | None = None,
        trace: Trace | None = None,
    ) -> None:
        """Stand before the first batch; nothing is read and no process started yet.

        Raises:
            UserError: if there are fewer shards than lanes, the batch does not fit the lanes, or workers cannot see the shards.
        """
        _refuse_private(shard_urls, workers)
        run = lanes or Lanes(world_size, batch_size)
        self._plan = CropPlan(shard_urls=tuple(shard_urls), lanes=run, crops_per_image=crops_per_image, seed=seed)
        self._where = {"batch_size": batch_size, "rank": rank, "world_size": world_size, "accumulation": accumulation}
        self._workers, self._cache, self._trace = workers, cache, trace
        # Now, while it is new: validation may load networks into the task that nobody wants to send around.
        self._sent = pickled(transform) if workers else b""
        self._files = make_files(cache)
        self._sequence = CropSequence(self._plan, self._files, **self._where)
        self._maker, self._memory = CropMaker(transform, seed), BatchMemory()
        self._layout: BatchLayout | None = None
        self._pool: CropPool | None = None

    def __iter__(self) -> Self:
        """Return itself."""
        return self

    def __next__(self) -> dict[str, Tensor]:
        """Return the next micro-batch: what `transform` makes, stacked to (batch_size, ...).

        Raises:
            StageError: if a shard or sample is broken, or a loader worker ended by itself.
            ShardAwayError: if a shard's store does not answer.
            ChildProcessError: if a loader worker was killed.
        """
        crops = self._sequence.next_batch()
        arrays = self._make(crops) if self._pool is None else self._pool.next_batch()
        if self._trace is not None:
            for crop in crops:
                self._trace(crop.sample.key, crop.epoch, crop.draw)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def state(self) -> dict[str, object]:
        """Return, JSON-able, where the next batch starts, as far as this rank knows; a checkpoint keeps those of all ranks."""
        return self._sequence.state()

    def restore(self, states: State | Sequence[State]) -> None:
        """Go on from a checkpoint: the next batches are those that would have come then, whatever the number of ranks was.

        Args:
            states: those of all ranks that wrote it. This rank's own is enough where their number did not change.

        Raises:
            UserError: if they are of a reader of other data, do not fit each other, or some are missing.
        """
        self._sequence.restore(states)
        if self._pool is not None:
            self._pool.jump(self._sequence.state())

    def close(self) -> None:
        """End worker processes and the fetching of shards. They also end with this process, and with the last reference to this."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        self._files.close()

    @property
    def process_ids(self) -> Sequence[int]:
        """Ids of the worker processes; none before the first batch."""
        return [] if self._pool is None else self._pool.process_ids

    def _make(self, crops: Sequence[Crop]) -> Arrays:
        """Make a batch here. If there are workers, it is the first one, and they start meanwhile."""
        arrays: Arrays = {}
        for position, crop in enumerate(crops):
            example = self._maker.make(crop)
            if self._layout is None:
                self._layout = BatchLayout.of(example, len(crops))
            if self._workers and self._pool is None:
                self._pool = self._start_pool(self._layout)
            arrays = arrays or self._memory.take(self._layout)
            place(arrays, position, example, crop)
        return arrays

    def _start_pool(self, layout: BatchLayout) -> CropPool:
        """Start the worker processes at the next batch."""
        spec = WorkerSpec(
            parent=0,
            number=0,
            workers=self._workers,
            plan=self._plan,
            sequence=self._where,
            cache=self._cache,
            transform=self._sent,
            layout=layout,
            slots=AHEAD + SPARE,
        )
        return CropPool(spec, self._sequence.state())


def _refuse_private(shard_urls: Sequence[str], workers: int) -> None:
    """Raise if other processes are to read what only this one can see."""
    private = [url for url in shard_urls if not storage.is_shared(url)]
    if workers and private:
        got = f"train.loader_workers: got {workers} with shards in the memory of this process, {private[0]}"
        raise UserError(f"{got}; expected shards that other processes can read; fix: 0, or write the shards to a folder")
