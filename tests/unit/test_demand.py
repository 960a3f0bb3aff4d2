"""What is asked of a cluster's autoscaler, and when."""

from types import SimpleNamespace
from typing import Any

import pytest

from linearsr_platform.cluster import demand
from linearsr_platform.cluster.capacity import Share
from linearsr_platform.cluster.demand import EXPIRY_S, RENEW_S, Demand


def test_a_request_is_renewed_in_time_replaced_when_it_changes_and_taken_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, told = SimpleNamespace(now_s=0.0), []

    def request(requester_id: str, resources: list[dict[str, float]], expire_after_s: float) -> None:
        told.append((len(resources), resources[0], expire_after_s))

    coordinator: Any = SimpleNamespace(
        request_resources=SimpleNamespace(remote=request),
        cancel_request=SimpleNamespace(remote=lambda requester_id: told.append("taken back")),
    )
    monkeypatch.setattr(demand.time, "monotonic", lambda: clock.now_s)
    monkeypatch.setattr(demand.ray, "wait", lambda refs, timeout: None)
    monkeypatch.setattr(demand, "_coordinator", lambda: coordinator)
    share, asking = Share(cpus=2, gpus=1, memory_bytes=3e9), Demand()

    asking.ask(share, 0)
    asking.withdraw()
    assert told == []
    for now_s in (0.0, 0.3, RENEW_S - 0.1, RENEW_S, RENEW_S + 0.3):
        clock.now_s = now_s
        asking.ask(share, 3)
    three = (3, {"CPU": 2, "GPU": 1, "memory": 3e9}, EXPIRY_S)
    assert told == [three, three]
    assert RENEW_S < EXPIRY_S / 2
    asking.ask(share, 1)
    assert told[2:] == [(1, three[1], EXPIRY_S)]
    asking.withdraw()
    asking.withdraw()
    asking.ask(share, 0)
    assert told[3:] == ["taken back"]
