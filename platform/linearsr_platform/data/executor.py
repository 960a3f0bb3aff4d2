"""Who does the work of `prepare`: this process here, Ray tasks in `linearsr_platform.cluster.preparing`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar


class Piece(Protocol):
    """A piece of work."""

    @property
    def name(self) -> str:
        """What an error calls it."""


P = TypeVar("P", bound=Piece)
R = TypeVar("R")


class Executor(Protocol):
    """Applies a function to many pieces of work."""

    def map_unordered(self, function: Callable[[P], R], pieces: Sequence[P]) -> Iterator[tuple[int, R]]:
        """Yield (position, result) of every piece, in any order; function and pieces must be picklable.

        Raises:
            UserError: as the function does.
            StageError: as the function does, or naming the piece if whoever worked on it died.
        """
        ...


class SerialExecutor:
    """Does one piece after the other in this process."""

    def map_unordered(self, function: Callable[[P], R], pieces: Sequence[P]) -> Iterator[tuple[int, R]]:
        """Yield (position, result) of every piece, in order."""
        for position, piece in enumerate(pieces):
            yield position, function(piece)


Choose = Callable[[int], Executor]
"""Returns who shall do work on that many files."""


def alone(count: int) -> Executor:
    """Return an executor that needs nobody else, however many files there are."""
    return SerialExecutor()


OnProgress = Callable[[int, int, str], None]
"""Called with what is done, the total, and a few words: the first names the kind of work, and behind a comma is what was resumed."""
