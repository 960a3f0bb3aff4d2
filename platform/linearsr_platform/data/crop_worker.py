"""A process that decodes, crops and degrades for one `CropReader`. It ends when its reader does, however that ends. Imports no torch.

It walks through the reader's own sequence of crops, makes those of its images and writes them into the batch in shared memory.
"""

import mmap
import os
import pickle
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from traceback import format_exception
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from linearsr_platform import storage
from linearsr_platform.data.batches import BatchLayout, CropMaker, place
from linearsr_platform.data.cache import ShardCache
from linearsr_platform.data.lanes import Crop, CropPlan
from linearsr_platform.data.sequence import CropSequence
from linearsr_platform.data.shard_files import ShardAwayError, ShardFiles
from linearsr_platform.errors import StageError, UserError
from linearsr_platform.remote import passes

if TYPE_CHECKING:
    # A worker has no other use for pydantic, which takes a quarter of its start.
    from linearsr_platform.recipe.data_schema import ShardCacheConfig

LOOK_S = 5.0
"""Time between two looks whether the parent lives, should another process hold its end of the link open."""

DONE, FAILED = "done", "failed"
JUMP, MAKE = "jump", "make"


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What a worker process is told at its start; picklable."""

    parent: int
    """Process id."""
    number: int
    workers: int
    plan: CropPlan
    sequence: dict[str, int]
    """Arguments of `CropSequence`."""
    cache: "ShardCacheConfig | None"
    transform: bytes
    """Pickled."""
    layout: BatchLayout
    slots: int
    """Batches in shared memory."""


def make_files(cache: "ShardCacheConfig | None") -> ShardFiles:
    """Return what opens shards, through a cache if there is one."""
    if cache is None:
        return ShardFiles()
    return ShardFiles(ShardCache(cache.folder, max_bytes=int(cache.gb * 1e9), sha256=cache.sha256))


def serve(link: Connection, memory: int) -> None:
    """Work until the parent ends or closes its end.

    Args:
        link: to the parent; first comes a pickled `WorkerSpec`, then `JUMP` with states and `MAKE` with a slot's number. Each `MAKE` is
            answered by `DONE`, or by `FAILED` with an error that ends this process.
        memory: file descriptor of the shared memory.
    """
    # The parent is asked to stop by Ctrl-C and closes the link.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with _Reported(link) as report:
        spec: WorkerSpec = pickle.loads(link.recv_bytes())  # noqa: S301, it comes from the parent
        report.number = spec.number
        worker = _Worker(spec, memory)
        _single_thread()
        while (message := _receive(link, spec.parent)) is not None:
            what, content = message
            if what == JUMP:
                worker.sequence.restore(content)
            else:
                report.crop = None
                for position, crop in worker.own_crops():
                    report.crop = crop
                    worker.write(content, position, crop)
                link.send((DONE, None))


class _Worker:
    """The sequence, the examples and the batches of one process."""

    def __init__(self, spec: WorkerSpec, memory: int) -> None:
        self._spec = spec
        self.sequence = CropSequence(spec.plan, make_files(spec.cache), **spec.sequence)
        self._maker = CropMaker(pickle.loads(spec.transform), spec.plan.seed)  # noqa: S301, it comes from the parent
        buffer = memoryview(mmap.mmap(memory, spec.slots * spec.layout.slot_bytes))
        self._slots = [spec.layout.views(buffer, slot) for slot in range(spec.slots)]

    def own_crops(self) -> list[tuple[int, Crop]]:
        """Return the crops of the next batch that are this process's to make, with their positions: all of an image or none."""
        crops = self.sequence.next_batch()
        return [(position, crop) for position, crop in enumerate(crops) if crop.sample.number % self._spec.workers == self._spec.number]

    def write(self, slot: int, position: int, crop: Crop) -> None:
        """Make one example."""
        place(self._slots[slot], position, self._maker.make(crop), crop)


class _Reported:
    """Sends an error of its block to the parent; the parent's end is none."""

    def __init__(self, link: Connection) -> None:
        self._link = link
        self.number = 0
        self.crop: Crop | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        told = self._told(error)
        # An error because the parent closed its end finds nobody here. It is not known by its kind: a store's connection may break too.
        with suppress(BrokenPipeError, ConnectionResetError):
            self._link.send((FAILED, (type(told), str(told), "".join(format_exception(error)))))
        return True

    def _told(self, error: Exception) -> Exception:
        """Return the error that the parent raises: what may pass stays one that does not end a training for good."""
        if isinstance(error, StageError | UserError | ShardAwayError):
            return error
        what = storage.shown(f"{type(error).__name__}: {error}")
        sample = None if self.crop is None else self.crop.sample
        where = "training data" if sample is None else f"shard {storage.shown(sample.url)}: sample {sample.key}"
        kind = ConnectionError if passes(error) else ChildProcessError if isinstance(error, MemoryError) else StageError
        return kind(f"{where}: loader worker {self.number} failed: {what}; fix: its cause; --verbose shows where it is")


def _receive(link: Connection, parent: int) -> tuple[str, Any] | None:
    """Return the next message; None if the parent is gone."""
    while not link.poll(LOOK_S):
        if os.getppid() != parent:
            return None
    message: tuple[str, Any] = link.recv()
    return message


def _single_thread() -> None:
    """Keep libraries that the transform brought along on one thread: there is a process for each core."""
    if "torch" in sys.modules:
        import_module("torch").set_num_threads(1)
    if "cv2" in sys.modules:
        import_module("cv2").setNumThreads(0)
