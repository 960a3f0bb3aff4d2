"""Pieces of work for a crew: some kill whoever does them. On PYTHONPATH, because Ray's workers import it too."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from linearsr_platform.cluster.shipping import ShippedFolder
from linearsr_platform.errors import UserError


@dataclass(frozen=True)
class CrewPiece:
    """A number to square, and what happens meanwhile."""

    name: str
    number: int = 0
    what: Literal["square", "die once", "die", "fault", "mistake"] = "square"


@dataclass(frozen=True)
class MakeSquarer:
    """Makes what squares; every process leaves a file when it makes it, and one for each piece that it begins."""

    folder: str
    dies: bool = False

    def __call__(self) -> Callable[[CrewPiece], int]:
        self._mark("made")
        if self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._square

    def _square(self, piece: CrewPiece) -> int:
        first = self._mark(piece.name) == 1
        if piece.what == "die" or (piece.what == "die once" and first):
            os.kill(os.getpid(), signal.SIGKILL)
        if piece.what == "fault":
            raise ZeroDivisionError("by zero")
        if piece.what == "mistake":
            raise UserError("theirs: got it wrong")
        return piece.number**2

    def _mark(self, name: str) -> int:
        """Leave a file, and return how many of this name there are now."""
        Path(self.folder, f"{name}-{os.getpid()}").touch()
        return marks(self.folder, name)


def marks(folder: str | Path, name: str) -> int:
    """Count the processes that left a file of this name."""
    return len(list(Path(folder).glob(f"{name}-*")))


@dataclass(frozen=True)
class MakeReader:
    """Makes what reads files of a folder that was sent."""

    shipped: ShippedFolder

    def __call__(self) -> Callable[[CrewPiece], tuple[str, bytes]]:
        folder = self.shipped.unpack()
        return lambda piece: (str(folder), (folder / piece.name).read_bytes())
