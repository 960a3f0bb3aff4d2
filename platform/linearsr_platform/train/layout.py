"""Where every number of a network is: which run of which parameter each of this worker's master weights holds, at every ZeRO stage.

It is what makes a checkpoint independent of stage and number of workers: runs have the parameter's name and bounds, not the flat
tensor's. DeepSpeed's universal checkpoints rest on the same arithmetic.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from linearsr_platform.train.processes import rank
from linearsr_platform.train.sharding import bfloat16_copies, master_weights
from linearsr_platform.train.spans import Piece, Span


def layout(network: nn.Module, optimizer: Any, stage: int) -> tuple[Piece, ...]:
    """Return the runs of all trained parameters that this worker's master weights hold; padding is left out."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    if stage == 0:
        return tuple(_whole(optimizer, names))
    if stage == 3:
        return tuple(_partitioned(optimizer, names))
    return tuple(_flattened(optimizer, names))


def spans(kind: str, pieces: Iterable[Piece], tensors: Sequence[Tensor], *, replicated: bool) -> list[Span]:
    """Return pieces as runs of `tensors`, which are the master weights or what belongs to each of them."""
    return [Span(f"{kind}/{one.name}", one.shape, one.start, one.of(tensors[one.weight]), replicated) for one in pieces]


def untrained_spans(network: nn.Module, stage: int) -> list[Span]:
    """Return what the optimizer does not hold: buffers that are part of the state dict, and frozen parameters."""
    kept = network.state_dict(keep_vars=True)
    found = []
    for name, value in kept.items():
        if not isinstance(value, nn.Parameter):
            found.append(Span(f"buffer/{name}", tuple(value.shape), 0, value.detach().view(-1), replicated=True))
        elif not value.requires_grad and stage == 3:
            part: Any = value
            start, length = rank() * part.ds_tensor.numel(), part.ds_tensor.numel()
            count = max(0, min(length, part.ds_numel - start))
            found.append(Span(f"frozen/{name}", tuple(part.ds_shape), start, part.ds_tensor.detach().view(-1)[:count], replicated=False))
        elif not value.requires_grad:
            found.append(Span(f"frozen/{name}", tuple(value.shape), 0, value.detach().view(-1), replicated=True))
    return found


def _whole(optimizer: Any, names: dict[int, str]) -> Iterator[Piece]:
    """Stage 0: each master weight is a parameter, or the copy of a bfloat16 one."""
    originals = {id(master): parameter for parameter, master in bfloat16_copies(optimizer)}
    for index, master in enumerate(master_weights(optimizer, 0)):
        parameter = originals.get(id(master), master)
        yield Piece(names[id(parameter)], tuple(parameter.shape), 0, parameter.numel(), index, 0)


def _flattened(optimizer: Any, names: dict[int, str]) -> Iterator[Piece]:
    """Stages 1 and 2: each group is flattened and cut into equal parts, one a worker, wherever that falls."""
    if hasattr(optimizer, "bf16_groups"):
        # What DeepSpeed uses at stage 1 if `zero.extra` has it accumulate gradients in float32.
        groups, offsets = optimizer.bf16_groups, [_running(group) for group in optimizer.bf16_groups]
    else:
        groups, offsets = optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets
    for index, (group, starts, master) in enumerate(zip(groups, offsets, master_weights(optimizer, 1), strict=True)):
        first = rank() * master.numel()
        for parameter, offset in zip(group, starts, strict=True):
            begin, end = max(offset, first), min(offset + parameter.numel(), first + master.numel())
            if begin < end:
                yield Piece(names[id(parameter)], tuple(parameter.shape), begin - offset, end - offset, index, begin - first)


def _partitioned(optimizer: Any, names: dict[int, str]) -> Iterator[Piece]:
    """Stage 3: each parameter is cut into equal parts, and a worker's parts of a group lie one behind the other."""
    groups = zip(optimizer.fp16_groups, optimizer.fp16_partitioned_groups, strict=True)
    for index, (group, partitions) in enumerate(groups):
        offset = 0
        for parameter, partition in zip(group, partitions, strict=True):
            start = rank() * partition.numel()
            stop = min(start + partition.numel(), parameter.ds_numel)
            if start < stop:
                yield Piece(names[id(parameter)], tuple(parameter.ds_shape), start, stop, index, offset)
            offset += partition.numel()


def _running(group: Sequence[Tensor]) -> list[int]:
    """Return the offset of each tensor when they lie one behind the other."""
    offsets, offset = [], 0
    for tensor in group:
        offsets.append(offset)
        offset += tensor.numel()
    return offsets
