"""Pieces of work for a crew, and what does them. On PYTHONPATH, because Ray's workers import it too."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from linearsr_platform.cluster.shipping import ShippedFolder
from linearsr_platform.errors import UserError


@dataclass(frozen=True)
class Number:
    """A piece."""

    value: int

    @property
    def name(self) -> str:
        """What an error calls it."""
        return f"number {self.value}"


@dataclass(frozen=True)
class MakeSquare:
    """Makes what squares numbers, and says in `folder` each time that it was made."""

    folder: str
    dies_at: int | None = None
    """A number whose worker is killed, once or always."""
    always: bool = False
    fails_at: int | None = None
    refuses: bool = False
    waits_for: int = 1
    """Functions that must have been made before the first piece is done."""

    def __call__(self) -> Callable[[Number], tuple[int, int, int]]:
        """Return a function to (square, process, threads)."""
        if self.refuses:
            raise UserError("model: got none; expected one")
        Path(self.folder, f"made-{os.getpid()}").touch(exist_ok=False)
        return self._square

    def _square(self, piece: Number) -> tuple[int, int, int]:
        while len(list(Path(self.folder).glob("made-*"))) < self.waits_for:
            time.sleep(0.05)
        died = Path(self.folder, "died")
        if piece.value == self.dies_at and (self.always or not died.exists()):
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if piece.value == self.fails_at:
            raise ZeroDivisionError("by nought")
        return piece.value**2, os.getpid(), torch.get_num_threads()


@dataclass(frozen=True)
class MakeReader:
    """Makes what reads from a folder that was shipped."""

    shipped: ShippedFolder

    def __call__(self) -> Callable[[Number], tuple[str, bytes]]:
        """Return a function to (folder, what is in its file `below/file`)."""
        folder = self.shipped.unpack()
        return lambda piece: (str(folder), (folder / "below" / "file").read_bytes())
