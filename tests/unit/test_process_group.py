"""Workers on several machines meet at the addresses that Ray reaches them by, not where the machines' own names lead to."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import ray.util

from linearsr_platform.cluster import process_group
from linearsr_platform.cluster.process_group import LateTorch, _LateTorchBackend, interface_of

INTERFACE = "GLOO_SOCKET_IFNAME"


class Machines:
    """Workers, one on each machine, as the controller sees them: whatever they execute is executed here, one after the other."""

    def __init__(self, *addresses: str) -> None:
        self._addresses = addresses
        self.joined_by: list[str | None] = []

    def __len__(self) -> int:
        return len(self._addresses)

    def execute(self, function: Callable[[], object]) -> list[object]:
        return [self._on(address, function) for address in self._addresses]

    def execute_single(self, rank: int, function: Callable[..., object]) -> object:
        return (self._addresses[rank], 1) if function is process_group.get_address_and_port else self._on(self._addresses[rank], function)

    def execute_single_async(self, rank: int, function: Callable[..., object], **_: Any) -> int:
        assert function is process_group._join
        self.joined_by.append(os.environ.get(INTERFACE))
        return rank

    def _on(self, address: str, function: Callable[[], object]) -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ray.util, "get_node_ip_address", lambda: address)
            return function()


@pytest.fixture
def meet(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str | None]]:
    """Return what brings workers of the machines together, and gives the interface that gloo was told when each joined."""
    monkeypatch.setattr("ray.train.torch.config._set_torch_distributed_env_vars", lambda: None)
    monkeypatch.setattr(process_group.ray, "get", lambda references: references)
    # First set, so that it is as it was afterwards.
    monkeypatch.setenv(INTERFACE, "")
    monkeypatch.delenv(INTERFACE)

    def meet(*addresses: str) -> list[str | None]:
        machines = Machines(*addresses)
        _LateTorchBackend().on_start(machines, LateTorch("gloo"))
        return machines.joined_by

    return meet


def test_workers_on_several_machines_meet_by_the_interface_that_has_the_address_of_the_machine(meet) -> None:
    assert meet("127.0.0.1", "192.0.2.7") == ["lo", "lo"]


def test_workers_on_one_machine_meet_as_torch_will(meet) -> None:
    assert meet("127.0.0.1", "127.0.0.1") == [None, None]


def test_an_address_that_no_interface_has_changes_nothing(meet) -> None:
    assert meet("192.0.2.6", "192.0.2.7") == [None, None]


def test_the_interface_that_a_machine_names_is_kept(meet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERFACE, "bond0")

    assert meet("127.0.0.1", "192.0.2.7") == ["bond0", "bond0"]


def test_an_interface_is_found_by_its_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.7") is None
