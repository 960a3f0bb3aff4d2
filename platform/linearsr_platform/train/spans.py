"""Runs of a network's numbers, by name and bounds; see `linearsr_platform.train.layout`. Imports no DeepSpeed: drivers read these too."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of one flattened parameter, and where it is among this worker's master weights."""

    name: str
    """As the task's network names the parameter."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    stop: int
    weight: int
    """Number of the master weight that holds it."""
    offset: int
    """Of its first number in that flattened master weight."""

    def of(self, tensor: Tensor) -> Tensor:
        """Return the run as a view, given the master weight or what belongs to it, like a moment."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.stop - self.start)


@dataclass(frozen=True, slots=True)
class Span:
    """A run of live numbers under the name that it has in checkpoints."""

    key: str
    """Kind and name of the parameter or buffer: `weight/blocks.0.bias`."""
    shape: tuple[int, ...]
    """Of the whole parameter or buffer."""
    start: int
    values: Tensor
    """(stop - start,); writing to it changes network, optimizer or average."""
    replicated: bool
    """Whether every worker has it."""

    @property
    def stop(self) -> int:
        """Index behind the last number."""
        return self.start + self.values.numel()

    def share(self, part: int, parts: int) -> "Span":
        """Return one of `parts` equal parts of a run, so that workers can share the writing."""
        count = self.values.numel()
        first, last = count * part // parts, count * (part + 1) // parts
        return Span(self.key, self.shape, self.start + first, self.values[first:last], self.replicated)
