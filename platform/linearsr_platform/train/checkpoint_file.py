"""One worker's file of a checkpoint: filled in memory, written with its hash by whom it may concern, read in parts by anyone.

The files are safetensors (https://github.com/huggingface/safetensors, "Format"): nothing in one is ever executed. They are put together
here and not by the library, because the memory that training is copied to is then already what the file holds.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from linearsr_platform import storage
from linearsr_platform.train.spans import Span

CHUNK_BYTES = 2**20
"""Hashed while it is still in the processor's cache from being written."""
DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
"""Names in the format, by falling size: in this order all tensors are aligned."""


@dataclass(frozen=True, slots=True)
class Written:
    """What was written, to be checked when it is read."""

    bytes: int
    hash: str
    """XXH3 of the whole file, 128 bits in hex. It finds damage, not forgery, and costs a tenth of the writing; sha256 costs twice it."""


class Staging:
    """Host memory that a worker's share of training is copied to, laid out as the file that will hold it; allocated once."""

    def __init__(self) -> None:
        """Allocate nothing yet."""
        self._plan: list[tuple[str, int, int, torch.dtype]] = []
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._slots: list[Tensor] = []
        self._header = b""

    @torch.no_grad()
    def fill(self, spans: Sequence[Span]) -> None:
        """Copy runs of numbers into the memory, which is first made to fit if they are others than last time."""
        order = list(DTYPES)
        spans = sorted(spans, key=lambda span: order.index(span.values.dtype))
        plan = [(span.key, span.start, span.stop, span.values.dtype) for span in spans]
        if plan != self._plan:
            self._allocate(spans)
            self._plan = plan
        for span, slot in zip(spans, self._slots, strict=True):
            slot.copy_(span.values, non_blocking=True)
        if self._memory.is_pinned():
            torch.cuda.current_stream().synchronize()

    def _allocate(self, spans: Sequence[Span]) -> None:
        offset, places, entries = 0, [], {}
        for span in spans:
            end = offset + span.values.nbytes
            places.append((offset, end))
            entries[span.key] = {"dtype": DTYPES[span.values.dtype], "shape": [span.values.numel()], "data_offsets": [offset, end]}
            offset = end
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._header = len(header).to_bytes(8, "little") + header
        # Zeroed, so that its pages are there before the first copy and not during it.
        self._memory = torch.zeros(offset, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._slots = [self._memory[first:end].view(span.values.dtype) for span, (first, end) in zip(spans, places, strict=True)]

    def write(self, url: str) -> Written:
        """Write the memory as a file, whole or not at all. Not flushed to the disk: what a power cut takes shows in the hash."""
        hashing = xxhash.xxh3_128()
        with storage.atomic_file(url) as path, path.open("wb", buffering=0) as file:
            for chunk in self._chunks():
                _write_all(file, chunk)
                hashing.update(chunk)
        return Written(len(self._header) + self._memory.numel(), hashing.hexdigest())

    def _chunks(self) -> Iterator[memoryview]:
        yield memoryview(self._header)
        data = memoryview(cast("Any", self._memory.numpy()))
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]


def _write_all(file: Any, chunk: memoryview) -> None:
    """Write all of a chunk; a nearly full disk takes only a part of it, and then nothing."""
    done = 0
    while done < len(chunk):
        done += file.write(chunk[done:])


def damage(path: Path, expected: Written) -> str | None:
    """Say in a few words how a file differs from what was written; None if it does not."""
    if not path.exists():
        return "is missing"
    if (found := path.stat().st_size) != expected.bytes:
        return f"has {found} bytes instead of {expected.bytes}"
    hashing = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            hashing.update(chunk)
    return None if hashing.hexdigest() == expected.hash else "has another content than was written: its hash differs"


class Shards:
    """The files of all workers that wrote a checkpoint, read by name and bounds. A context manager."""

    def __init__(self, paths: dict[int, Path], runs: Sequence[dict[str, dict[str, Any]]]) -> None:
        """Open nothing yet.

        Args:
            paths: local file of each worker that is read from.
            runs: of each worker that wrote, by key, the `start` and `stop` of what it has.
        """
        self._paths, self._runs = paths, runs
        self._open: dict[int, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Be ready to read."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._open.clear()
        self._stack.close()

    @torch.no_grad()
    def read(self, span: Span) -> bool:
        """Set a run of live numbers to what was saved; False if not all of it was."""
        missing = span.values.numel()
        for worker, first, last in overlaps(self._runs, span):
            start = self._runs[worker][span.key]["start"]
            part = self._file(worker).get_slice(span.key)[first - start : last - start]
            span.values[first - span.start : last - span.start].copy_(part)
            missing -= last - first
        return missing == 0

    def whole(self, worker: int, key: str) -> Tensor:
        """Return a whole tensor of one worker."""
        tensor: Tensor = self._file(worker).get_tensor(key)
        return tensor

    def _file(self, worker: int) -> Any:
        if worker not in self._open:
            self._open[worker] = self._stack.enter_context(safe_open(self._paths[worker], framework="pt"))
        return self._open[worker]


def overlaps(runs: Sequence[dict[str, dict[str, Any]]], span: Span) -> Iterator[tuple[int, int, int]]:
    """Yield worker, start and stop of the parts of a span that workers wrote."""
    for worker, own in enumerate(runs):
        run = own.get(span.key)
        if run is not None:
            first, last = max(span.start, run["start"]), min(span.stop, run["stop"])
            if first < last:
                yield worker, first, last
