"""Torch's process group between the workers of a trainer, prepared by processes that do without torch.

Ray's own `TorchConfig` brings torch to the task that starts a trainer and to its controller, neither of which computes anything. What
the workers run is Ray's.
"""

import fcntl
import socket
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray._common.network_utils import build_address  # type: ignore[attr-defined]
from ray.exceptions import GetTimeoutError, RayTaskError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.util import TrainingFramework

from linearsr_platform.cluster.session import meet_by

JOIN_S = 1800
"""How long an operation of the group waits for the other workers, s: what Ray's `TorchConfig` takes."""
LEAVE_S = 30.0
"""How long workers get to leave the group before they are ended without, s."""
ADDRESS_OF_INTERFACE = 0x8915
"""Linux's request SIOCGIFADDR."""


@dataclass(frozen=True, slots=True)
class LateTorch(BackendConfig):
    """What `TorchConfig` stands for, with torch imported by the workers alone."""

    backend: str
    """Of `torch.distributed`: gloo or nccl."""

    @property
    def backend_cls(self) -> type["_LateTorchBackend"]:
        """Return what sets the group up."""
        return _LateTorchBackend

    @property
    def train_func_context(self) -> Callable[[], AbstractContextManager[None]]:
        """Return what workers train in."""
        return on_own_device if self.backend == "nccl" else nullcontext

    @property
    def framework(self) -> TrainingFramework:
        """Return what Ray shows."""
        return TrainingFramework.TORCH

    def to_dict(self) -> dict[str, Any]:
        """Return what Ray shows."""
        return {"backend": self.backend, "init_method": "tcp", "timeout_s": JOIN_S}


class _LateTorchBackend(Backend):
    """Lives in the controller and sends the workers into their group and out of it."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Bring all workers into one group, led by the first.

        Raises:
            WorkerGroupStartupFailedError: if they do not find together; Ray Train then starts others.
        """
        assert isinstance(backend_config, LateTorch)  # noqa: S101 (it named this class)
        # First, because importing torch takes seconds, and nobody holds the port until the leader listens there.
        addresses = worker_group.execute(_prepare)
        if len(set(addresses)) > 1:
            # Left alone, gloo listens where the machine's own name leads to: on Debian that is 127.0.1.1, which no other machine reaches.
            worker_group.execute(_meet_by_own_address)
        url, size = f"tcp://{build_address(*worker_group.execute_single(0, get_address_and_port))}", len(worker_group)
        each = {"world_size": size, "url": url, "backend": backend_config.backend}
        try:
            ray.get([worker_group.execute_single_async(rank, _join, world_rank=rank, **each) for rank in range(size)])
        except RayTaskError as error:
            if isinstance(error.cause, WorkerGroupStartupFailedError):
                raise error.cause from None
            raise

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Have all workers leave; one that hangs in an operation of the group is ended anyway."""
        with suppress(GetTimeoutError):
            ray.get(worker_group.execute_async(_leave, grouped=len(worker_group) > 1), timeout=LEAVE_S)


def on_own_device() -> AbstractContextManager[None]:
    """Make the worker's own GPU torch's current one."""
    from ray.train.torch.config import TorchConfigContextManager

    found: AbstractContextManager[None] = TorchConfigContextManager()
    return found


def interface_of(address: str) -> str | None:
    """Return the name of this machine's network interface that has an IPv4 address; None if none has, as behind a translation."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asked, ADDRESS_OF_INTERFACE, struct.pack("256s", name.encode()))
            except OSError:
                # It has no address.
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _meet_by_own_address() -> None:
    """Make gloo use the interface that Ray reaches this machine by, as a worker."""
    interface = interface_of(_own_address())
    if interface is not None:
        meet_by(interface)


def _prepare() -> str:
    """Import torch, as a worker, and set what it reads of the environment; return this machine's address."""
    from ray.train.torch import config

    config._set_torch_distributed_env_vars()  # type: ignore[no-untyped-call] # noqa: SLF001 (what `TorchConfig` has workers run)
    return _own_address()


def _own_address() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _join(world_rank: int, world_size: int, url: str, backend: str) -> None:
    """Join the group, as one of its workers."""
    from ray.train.torch import config

    try:
        config._setup_torch_process_group(backend, world_rank, world_size, init_method=url, timeout_s=JOIN_S)  # noqa: SLF001
    except RuntimeError as error:
        # As torch's own errors of a port that is taken, of a worker that does not come and of a lost connection are. The controller would
        # import torch to read one.
        raise WorkerGroupStartupFailedError(f"worker {world_rank} did not join the others: {type(error).__name__}: {error}") from None


def _leave(grouped: bool) -> None:
    """Leave the group, and free the GPU's cached memory."""
    from ray.train.torch import config

    config._shutdown_torch(destroy_process_group=grouped)  # type: ignore[no-untyped-call] # noqa: SLF001 (what `TorchConfig` has them run)
