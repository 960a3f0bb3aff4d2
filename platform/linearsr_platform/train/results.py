"""What the steps of training give. Needs torch alone, as what reads them on a device does."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step of this worker gave. Nothing in it has been waited for yet."""

    loss: Tensor
    """Scalar mean over its micro-batches, detached."""
    scalars: dict[str, Tensor]
    """Means of what the task logs, detached."""
    grad_norm: Tensor | float
    """Norm of the whole gradient over all workers, before clipping."""
    screened: Tensor | None = None
    """Number of its micro-batches that were left out for their loss; None where there was no limit."""
    attention: Tensor | None = None
    """(layers, 4) rows of `linearsr.probes.AttentionProbe`, in network order, if they were asked for."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """What one part of the network gave in an examined step on one worker."""

    kind: Literal["output", "normaliser", "gradient"]
    layer: str
    """Module or parameter, as the task's network names it."""
    value: float
    """Largest absolute value of an output or normaliser, norm of a gradient."""
