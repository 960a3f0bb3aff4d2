"""The exponential moving average of weights: what is validated and released. Works on shards, so at every ZeRO stage."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from linearsr_platform.train.layout import spans
from linearsr_platform.train.protocols import Engine
from linearsr_platform.train.spans import Span


class ExponentialAverage:
    """Averages the float32 weights that this worker owns; all workers together average the whole network."""

    def __init__(self, engine: Engine, decay: float) -> None:
        """Start from the engine's present weights; `decay` is the limit that the average warms up to."""
        self._engine = engine
        self._decay = decay
        self._weights = engine.master_weights()
        self._averages = [weight.detach().clone() for weight in self._weights]

    def update(self, step: int) -> None:
        """Move the average towards the weights after update number `step`, counted from 1.

        The decay is min(decay, (1 + step) / (10 + step)), so that the first weights are soon forgotten.
        """
        average = get_ema_multi_avg_fn(min(self._decay, (1 + step) / (10 + step)))  # type: ignore[no-untyped-call]
        average(self._averages, self._weights, step)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the network use the average inside the block, and afterwards the very same weights as before.

        After an error inside, weights stay swapped: putting them back needs all workers, and the error may be one's own.
        """
        self._exchange()
        yield
        self._exchange()

    def tensors(self) -> list[Tensor]:
        """Return this worker's share of the average, in a fixed order."""
        return self._averages

    def spans(self) -> list[Span]:
        """Return the live average as runs of the parameters that it is of, as far as this worker has them."""
        return spans("average", self._engine.layout, self._averages, replicated=self._engine.zero_stage == 0)

    @torch.no_grad()
    def restore(self, tensors: Sequence[Tensor]) -> None:
        """Continue from what `tensors` returned.

        Raises:
            ValueError: if number or shapes differ.
        """
        shapes = [list(tensor.shape) for tensor in tensors]
        expected = [list(average.shape) for average in self._averages]
        if shapes != expected:
            raise ValueError(f"average of weights: got shapes {shapes}; expected {expected}; fix: resume with the same recipe")
        for average, tensor in zip(self._averages, tensors, strict=True):
            average.copy_(tensor)

    @torch.no_grad()
    def _exchange(self) -> None:
        for weight, average in zip(self._weights, self._averages, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        self._engine.publish()
