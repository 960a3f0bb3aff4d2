"""What every part of a network gives in one step, in the order of computation: for the diagnosis after a trip, never in passing."""

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from linearsr.attention import LinearAttention
from linearsr_platform.train.results import Sighting


class Journal:
    """Hooks on a network's modules and parameters for the time of a `with` block.

    Outputs come in forward order. A gradient is noted when it reaches its parameter on this worker, before workers exchange theirs,
    so those come in backward order, and the first bad one of each is where the badness came from. It works at every ZeRO stage,
    because the hook is on the parameter itself, which backward meets whole.
    """

    def __init__(self, network: nn.Module) -> None:
        """Look at `network`; nothing happens before the block."""
        self._network = network
        self._handles: list[RemovableHandle] = []
        self._gradients: list[RemovableHandle] = []
        self._attentions: list[LinearAttention] = []
        self._notes: list[tuple[str, str, Tensor]] = []

    def __enter__(self) -> Self:
        """Hang the hooks in."""
        for name, module in self._network.named_modules():
            self._handles.append(module.register_forward_hook(self._on_output(name or "the network")))
            if isinstance(module, LinearAttention):
                module.probe = self._on_attention(name)
                self._attentions.append(module)
        return self

    def watch_gradients(self) -> None:
        """Look at the gradients of the backward pass that comes next; after any hook that the task has hung in by then."""
        for handle in self._gradients:
            handle.remove()
        parameters = [(name, one) for name, one in self._network.named_parameters() if one.requires_grad]
        self._gradients = [
            parameter.register_hook(self._on_gradient(name))  # type: ignore[no-untyped-call]
            for name, parameter in parameters
        ]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Take the hooks off."""
        for handle in [*self._handles, *self._gradients]:
            handle.remove()
        for attention in self._attentions:
            attention.probe = None

    def sightings(self) -> list[Sighting]:
        """Return what was noted, in order; waits for the device once."""
        if not self._notes:
            return []
        values = torch.stack([value.float() for _, _, value in self._notes]).tolist()
        return [Sighting(kind, layer, value) for (kind, layer, _), value in zip(self._notes, values, strict=True)]  # type: ignore[arg-type]

    def _on_output(self, name: str) -> Any:
        def note(module: nn.Module, arguments: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            for tensor in tensors:
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                    self._notes.append(("output", name, tensor.detach().abs().amax()))

        return note

    def _on_attention(self, name: str) -> Any:
        def note(_: Tensor, normaliser: Tensor) -> None:
            self._notes.append(("normaliser", name, normaliser.detach().abs().amax()))

        return note

    def _on_gradient(self, name: str) -> Any:
        def note(gradient: Tensor) -> None:
            self._notes.append(("gradient", name, gradient.detach().float().norm()))

        return note
