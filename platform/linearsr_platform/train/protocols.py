"""What the training loop needs of the parts it is given: a task, an engine, batches and an observer."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from linearsr.guard import Trip
from linearsr.kernels import Kernels
from linearsr.knee import KneeDecision
from linearsr.tags import Caption
from linearsr_platform.train.results import Sighting, StepResult
from linearsr_platform.train.spans import Piece, Span

Batch = dict[str, Tensor]
"""One micro-batch: name -> (B, ...) tensor."""
Example = dict[str, NDArray[Any]]
"""One sample of a batch: name -> array."""


class Task(Protocol):
    """What is trained: a network, its examples, its loss and its validation. Knows nothing of workers or sharding."""

    kernels: Kernels | None
    """What its networks and metrics compute with on a CPU; None is plain torch. Set before `build`."""

    def build(self) -> nn.Module:
        """Return a freshly initialised network in float32 on the CPU, the same one on every worker."""
        ...

    def transform(
        self, image: NDArray[np.uint8], tags: Sequence[str] | Caption, rng: np.random.Generator, latent: NDArray[Any] | None = None
    ) -> Example:
        """Make one training example from an image (H, W, 3) and its tags, or a `Caption` where a sample has more than tags.

        Where shards hold latents it is given the image's too. All randomness comes from `rng`.
        """
        ...

    def validation_example(self, image: NDArray[np.uint8], tags: Sequence[str] | Caption, crop_px: int, index: int) -> Example:
        """Make the `index`-th validation example, the same at every call."""
        ...

    def loss(self, module: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss of a batch and detached scalars to log, under the same names every time.

        All randomness comes from `generator` (on the CPU): its state is part of a checkpoint, torch's own is not.
        """
        ...

    def validate(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Measure a validation batch: metric name -> (B,) float values, deterministic. Runs without gradients."""
        ...


class BatchSource(Iterator[Batch], Protocol):
    """An endless stream of micro-batches on the CPU for one worker, which can be resumed at any point."""

    def state(self) -> dict[str, object]:
        """Return where the stream is, as JSON."""
        ...

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue from the `state` of every worker at one step, so that the next batch is the one that would have come.

        Where their number is another than the present one, so that together the workers give what would have come.
        """
        ...


class Engine(Protocol):
    """Holds the network, sharded over workers, and moves it. All workers call every method equally often."""

    generator: torch.Generator
    """Where this worker's training noise comes from."""
    attentions: tuple[str, ...]
    """Names of the network's linear attentions, in network order."""
    layout: tuple[Piece, ...]
    """Where the trained parameters are among this worker's master weights."""
    zero_stage: int
    precision: str

    def train_step(self, batches: Iterable[Batch], lr: float, *, probe: bool = False, loss_limit: float | None = None) -> StepResult:
        """Accumulate the gradients of the micro-batches and move the weights once, at learning rate `lr`.

        Args:
            batches: of this worker.
            lr: learning rate.
            probe: whether to look into the linear attentions.
            loss_limit: micro-batches whose loss is above it count for nothing; found without waiting for the device.
        """
        ...

    def examine(self, batches: Iterable[Batch]) -> tuple[StepResult, list[Sighting]]:
        """Take a step while looking at every part of the network, in the order of computation. Leaves weights and moments spoilt."""
        ...

    def capture(self, into: Any = None) -> object:
        """Copy this worker's weights and moments to host memory, that of an earlier copy if it is given."""
        ...

    def restore(self, captured: Any) -> None:
        """Set weights and moments to what `capture` returned on each worker."""
        ...

    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """Measure a batch with the present weights: metric name -> (B,) values."""
        ...

    def master_weights(self) -> list[Tensor]:
        """Return the float32 weights that this worker owns, in a fixed order. They may be written in place."""
        ...

    def publish(self) -> None:
        """Make the network use the master weights of all workers, after they were written."""
        ...

    def full_weights(self) -> dict[str, Tensor]:
        """Return the state dict of the task's network, parameters in float32, on the CPU; empty on workers other than 0."""
        ...

    def spans(self) -> list[Span]:
        """Return live weights, moments if there are any yet, buffers and frozen parameters, as far as this worker has them."""
        ...

    def optimizer_step(self) -> float | None:
        """Return the number of updates that the optimizer has counted; None before the first, or where this worker owns nothing."""
        ...

    def prepare_moments(self, step: float | None) -> None:
        """Make room for the moments of `step` updates, as `spans` to be filled; None takes them away."""
        ...


class Observer(Protocol):
    """Who is told how training goes. Worker 0 only, but for trips."""

    def on_start(self, step: int) -> None:
        """Take that training begins, after `step` steps of earlier attempts."""
        ...

    def on_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Take the metrics of the steps since the last call."""
        ...

    def on_validation(self, step: int, values: Mapping[str, float], decision: KneeDecision) -> None:
        """Take a validation and what the knee detector made of it."""
        ...

    def on_trip(self, step: int, trip: Trip) -> None:
        """Take a trip of the guard; `step` is where training goes on from, or where it stopped. Every worker."""
        ...

    def on_checkpoint(self, step: int) -> None:
        """Take that from now on a run that is interrupted resumes at `step`."""
        ...

    def on_message(self, step: int, text: str) -> None:
        """Take what went wrong without stopping training."""
        ...
