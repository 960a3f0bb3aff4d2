"""DeepSpeed's weights behind three functions that mean the same at every ZeRO stage.

Master weights are float32 and each worker owns some: stage 0 all of them (the parameters themselves, or copies of bfloat16 ones), stages 1
and 2 its share in flat copies, stage 3 its share in flat tensors that the parameters are gathered from.
"""

from typing import Any

import torch
from deepspeed import zero
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn


def master_weights(optimizer: Any, stage: int) -> list[Tensor]:
    """Return this worker's master weights, in a fixed order."""
    if stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    return [weight for group in optimizer.param_groups for weight in group["params"]]


@torch.no_grad()
def publish(optimizer: Any, stage: int) -> None:
    """Set the network's parameters to the master weights of all workers. Collective from stage 1 on."""
    if stage == 3:
        _publish_partitions(optimizer)
    elif stage > 0:
        optimizer.update_lp_params()
    else:
        for parameter, master in _copies(optimizer):
            parameter.copy_(master)


@torch.no_grad()
def full_weights(network: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Return the network's state dict with whole parameters in float32, on the CPU. Collective from stage 1 on."""
    masters = {id(parameter): master for parameter, master in _copies(optimizer)}
    weights = {}
    for name, value in network.state_dict(keep_vars=True).items():
        full = masters.get(id(value), value)
        if isinstance(value, nn.Parameter) and full is value:
            full = _gathered(value)
        weights[name] = full.detach().cpu().clone()
    return weights


def _copies(optimizer: Any) -> list[tuple[Tensor, Tensor]]:
    """Pair bfloat16 parameters with their whole float32 copies, which only stage 0 has."""
    if not hasattr(optimizer, "fp32_groups"):
        return []
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return [pair for low, high in groups for pair in zip(low, high, strict=True)]


def _gathered(parameter: nn.Parameter) -> Tensor:
    """Return a whole parameter in float32; frozen ones have no master weights and are taken as they are."""
    full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
    if full is not None:
        return full  # type: ignore[no-any-return]
    with zero.GatheredParameters([parameter]):
        return parameter.float().clone()


def _publish_partitions(optimizer: Any) -> None:
    """Do what DeepSpeed does after loading a stage 3 checkpoint: copy, point partitions at the copies, gather what stays gathered."""
    optimizer.checkpoint_event_prologue()
    groups = zip(
        optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, optimizer.fp16_partitioned_groups, strict=True
    )
    for master, flat, partitions in groups:
        flat.copy_(master)
        for partition, view in zip(partitions, optimizer.unflatten(flat, partitions), strict=True):
            partition.data = view.data
    optimizer.checkpoint_event_epilogue()
