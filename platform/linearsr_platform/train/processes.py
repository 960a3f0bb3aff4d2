"""The workers of one trainer as a torch process group: joining it, and the few collectives the loop needs."""

import torch
import torch.distributed as dist
from torch import Tensor


def join_group() -> None:
    """Use the process group that the launcher made; without one, be a group of one.

    A lone process rendezvouses in its own memory, so it needs no port.
    """
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def rank() -> int:
    """Return the number of this worker, 0 upwards."""
    return dist.get_rank()


def world_size() -> int:
    """Return the number of workers."""
    return dist.get_world_size()


def sum_over_workers(values: Tensor) -> Tensor:
    """Add a tensor up over all workers; every worker gets the sum."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def collect(value: object) -> list[object]:
    """Gather one picklable value of each worker, in order of rank; every worker gets the list."""
    values: list[object] = [value]
    if world_size() > 1:
        values *= world_size()
        dist.all_gather_object(values, value)
    return values
