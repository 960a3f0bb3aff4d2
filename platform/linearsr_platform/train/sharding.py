"""DeepSpeed's weights and moments behind functions that mean the same at every ZeRO stage.

Master weights are float32 and each worker owns some: stage 0 all of them (the parameters themselves, or copies of bfloat16 ones), stages 1
and 2 its share in flat copies, stage 3 its share in flat tensors that the parameters are gathered from.
"""

from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import zero
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW remembers of every weight, beside the number of its steps."""


@dataclass(frozen=True, slots=True)
class Shares:
    """What this worker owns of network and optimizer at one step, in host memory."""

    weights: list[Tensor]
    moments: list[dict[str, Tensor]]
    """Of each weight what the optimizer remembers; empty before the first step."""


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
        for parameter, master in bfloat16_copies(optimizer):
            parameter.copy_(master)


@torch.no_grad()
def capture(optimizer: Any, stage: int, into: Shares | None = None) -> Shares:
    """Copy this worker's master weights and optimizer state to host memory.

    Args:
        optimizer: DeepSpeed's.
        stage: of ZeRO.
        into: an earlier copy that is no longer needed; its memory is used again, which takes a third of the time of new memory.
    """
    weights, remembered = master_weights(optimizer, stage), moments(optimizer, stage)
    if into is None or [one.keys() for one in into.moments] != [one.keys() for one in remembered]:
        return Shares([_to_host(weight) for weight in weights], [{name: _to_host(one[name]) for name in one} for one in remembered])
    for old, weight in zip(into.weights, weights, strict=True):
        old.copy_(weight)
    for kept, one in zip(into.moments, remembered, strict=True):
        for name, value in one.items():
            kept[name].copy_(value)
    return into


@torch.no_grad()
def restore(optimizer: Any, stage: int, shares: Shares) -> None:
    """Set weights and optimizer state to what `capture` returned, on all workers. Collective from stage 1 on."""
    state = _state(optimizer)
    for weight, kept, moments in zip(master_weights(optimizer, stage), shares.weights, shares.moments, strict=True):
        weight.copy_(kept)
        if moments:
            for name, value in moments.items():
                state[weight][name].copy_(value)
        else:
            # As before the first step: the optimizer makes its state anew then.
            state.pop(weight, None)
    publish(optimizer, stage)


@torch.no_grad()
def full_weights(network: nn.Module, optimizer: Any, *, keep: bool) -> dict[str, Tensor]:
    """Return the network's state dict with whole parameters in float32, on the CPU. Collective from stage 1 on.

    Args:
        network: of the task.
        optimizer: DeepSpeed's.
        keep: whether this worker wants them; others take part, let go of each parameter at once, and return nothing.
    """
    masters = {id(parameter): master for parameter, master in bfloat16_copies(optimizer)}
    weights = {}
    for name, value in network.state_dict(keep_vars=True).items():
        full = masters.get(id(value), value)
        if isinstance(value, nn.Parameter) and full is value:
            full = _gathered(value)
        if keep:
            weights[name] = _to_host(full)
    return weights


def bfloat16_copies(optimizer: Any) -> list[tuple[Tensor, Tensor]]:
    """Pair bfloat16 parameters with their whole float32 copies, which only stage 0 has."""
    if not hasattr(optimizer, "fp32_groups"):
        return []
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return [pair for low, high in groups for pair in zip(low, high, strict=True)]


def moments(optimizer: Any, stage: int) -> list[dict[str, Tensor]]:
    """Return of each master weight what the optimizer remembers, live; empty before the first step."""
    state = _state(optimizer)
    return [dict(state.get(weight, {})) for weight in master_weights(optimizer, stage)]


def prepare_moments(optimizer: Any, stage: int, step: float | None) -> None:
    """Make AdamW's state as it is after `step` updates, moments still to be filled; None takes it away, as before the first step."""
    state = _state(optimizer)
    for weight in master_weights(optimizer, stage):
        if step is None:
            state.pop(weight, None)
            continue
        if not state.get(weight):
            # The fused AdamW counts on the weight's device.
            state[weight] = {"step": torch.zeros((), dtype=torch.float32, device=weight.device)}
            state[weight] |= {name: torch.zeros_like(weight) for name in MOMENTS}
        state[weight]["step"].fill_(step)


def _state(optimizer: Any) -> Any:
    """Return the state of torch's own optimizer, which DeepSpeed's wrap from stage 1 on and for bfloat16; by master weight."""
    return getattr(optimizer, "optimizer", optimizer).state


def _to_host(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


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
