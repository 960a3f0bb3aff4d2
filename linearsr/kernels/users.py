"""Who computes with kernels where there are some."""

from torch import nn

from linearsr.kernels.library import Kernels


class UsesKernels:
    """A module that does."""

    kernels: Kernels | None = None
    """None is plain torch."""


def use_kernels(network: nn.Module, kernels: Kernels | None) -> None:
    """Have all modules of a network that can compute with these kernels on a CPU do so, or with plain torch; elsewhere nothing changes."""
    for module in network.modules():
        if isinstance(module, UsesKernels):
            module.kernels = kernels
