"""Who applies something that is slow to make, such as a loaded model, to many pieces: this process here, Ray actors in `cluster.crew`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from linearsr_platform.data.executor import P, R

Make = Callable[[], Callable[[P], R]]
"""Makes the function that does one piece. Picklable; called once in every process that takes part."""


class Crew(Protocol):
    """Makes a function once a process and applies it to pieces."""

    def map_unordered(self, make: Make[P, R], pieces: Sequence[P]) -> Iterator[tuple[int, R]]:
        """Yield (position, result) of every piece, in any order; pieces and results must be picklable.

        Raises:
            UserError: as `make` and the function do.
            StageError: as they do, or naming the piece if whoever worked on it died.
        """
        ...


class SerialCrew:
    """Does one piece after the other in this process."""

    def map_unordered(self, make: Make[P, R], pieces: Sequence[P]) -> Iterator[tuple[int, R]]:
        """Yield (position, result) of every piece, in order; without pieces nothing is made."""
        if not pieces:
            return
        function = make()
        for position, piece in enumerate(pieces):
            yield position, function(piece)
