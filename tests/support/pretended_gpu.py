"""A GPU that is not there: tensors that say they are on another device, are computed by the CPU, and may not be mixed with the CPU's.

So branches for a GPU run with real numbers, and what would be copied to it, or waited for, is counted. What a GPU's own kernels do is
not seen.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
MIXES = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default}
"""Operations between devices."""


class PretendedGpu(TorchDispatchMode):
    """Computes what is asked for on its device; counts `copies` from the CPU, and `waits` for the content of a tensor."""

    # Or torch would look for a driver when a tensor is made on CUDA.
    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [leaf for leaf in leaves if isinstance(leaf, Pretended)]
        here = [leaf for leaf in leaves if not isinstance(leaf, Pretended)]
        if there and any(leaf.dim() for leaf in here) and func not in MIXES:
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, got {[tuple(leaf.shape) for leaf in here]} on the CPU"
            )
        wanted = kwargs.get("device")
        is_there = bool(there) if wanted is None else torch.device(wanted).type == self.device.type
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        self._count(func, args, moves=not there and is_there)
        result = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
        if not is_there or func is aten._local_scalar_dense.default:
            return result.clone() if there and isinstance(result, Tensor) and any(result is leaf.inside for leaf in there) else result
        known = {id(leaf.inside): leaf for leaf in there}
        # What was changed in place is what it was.
        return tree_map(lambda leaf: known[id(leaf)] if id(leaf) in known else self._outside(leaf), result)

    def _outside(self, leaf: Any) -> Any:
        return Pretended(leaf, self) if isinstance(leaf, Tensor) else leaf

    def _count(self, func: Any, args: Sequence[Any], *, moves: bool) -> None:
        if func is aten._to_copy.default:
            self.counts["copies"] += moves
        elif func is aten.copy_.default:
            self.counts["copies"] += isinstance(args[0], Pretended) and not isinstance(args[1], Pretended)
        elif func in (aten._local_scalar_dense.default, aten.nonzero.default):
            self.counts["waits"] += not moves and isinstance(args[0], Pretended)


class Pretended(Tensor):
    """A tensor on the device that is not there."""

    inside: Tensor
    gpu: PretendedGpu

    @staticmethod
    def __new__(cls, inside: Tensor, gpu: PretendedGpu) -> Self:
        made: Self = Tensor._make_wrapper_subclass(
            cls, inside.size(), strides=inside.stride(), storage_offset=inside.storage_offset(), dtype=inside.dtype, device=gpu.device
        )
        made.inside, made.gpu = inside, gpu
        return made

    def new_tensor(self, data: Any) -> Tensor:
        """Make a tensor of numbers by way of the CPU, as a GPU does; on `meta` torch would throw them away."""
        return torch.tensor(data, dtype=self.dtype).to(self.device)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        gpu = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Pretended)).gpu
        return gpu.__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def pretended_gpu(kind: str = "meta") -> Iterator[PretendedGpu]:
    """Let there be a GPU inside the block, under the name of a device: `meta`, or `cuda`, which knows no gradients without a driver."""
    lifts = torch._C._only_lift_cpu_tensors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "_apply", _apply)
        patch.setattr(nn.functional, "scaled_dot_product_attention", _softmax_attention)
        torch._C._set_only_lift_cpu_tensors(True)
        torch._C._ensureCUDADeviceGuardSet()
        try:
            with PretendedGpu(torch.device(kind, 0) if kind == "cuda" else torch.device(kind)) as gpu:
                yield gpu
        finally:
            torch._C._set_only_lift_cpu_tensors(lifts)


def _inside(leaf: Any) -> Any:
    return leaf.inside if isinstance(leaf, Pretended) else leaf


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Move a module by making its parameters anew: torch would move the memory below them."""
    for child in module.children():
        child._apply(fn)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(fn(parameter.data), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


def _softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Stand for a function that asks the driver which kernel to take."""
    assert not dropout_p
    assert not is_causal
    assert scale in (None, query.shape[-1] ** -0.5)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return (scores if attn_mask is None else scores.masked_fill(~attn_mask, float("-inf"))).softmax(dim=-1) @ value
