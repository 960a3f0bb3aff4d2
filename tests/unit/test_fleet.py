"""When the trainers of a stage are started: as machines come, also after the first has begun."""

from collections import deque
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from linearsr_platform.cluster import experts
from linearsr_platform.cluster.capacity import Room, Share
from linearsr_platform.recipe.schema import ClusterConfig
from linearsr_platform.recipe.train_schema import TrainConfig


@pytest.mark.parametrize(("address", "running"), [("head:6379", 4), (None, 1)])
def test_trainers_start_as_machines_join_a_running_cluster(monkeypatch: pytest.MonkeyPatch, address: str | None, running: int) -> None:
    """A head without CPUs at first, then three machines, for which an autoscaler was asked."""
    clock, there = SimpleNamespace(now_s=100.0), [Room(nodes=(Share(cpus=0),))]
    monkeypatch.setattr(experts.time, "monotonic", lambda: clock.now_s)
    monkeypatch.setattr(experts, "room_now", lambda: there[0])
    started: list[Any] = []
    asked: list[int] = []
    monkeypatch.setattr(experts, "Demand", lambda: SimpleNamespace(ask=lambda share, workers: asked.append(workers)))
    task = SimpleNamespace(remote=lambda job, *rest: started.append(job) or len(started))
    monkeypatch.setattr(experts, "_train", SimpleNamespace(options=lambda name: task))
    nobody = cast("Any", None)
    fleet = experts._Fleet(ClusterConfig(address=address), Share(cpus=1), there[0], "nowhere", nobody, keep=False)
    job = SimpleNamespace(name="", train=TrainConfig(max_steps=1), memory_bytes=None)
    queue: deque[Any] = deque(SimpleNamespace(**{**vars(job), "name": f"expert-{number}"}) for number in range(4))
    fleet._start(queue)
    assert len(started) == 1
    there[0] = replace(there[0], nodes=(*there[0].nodes, *[Share(cpus=2)] * 3))
    fleet._start(queue)
    assert len(started) == 1
    clock.now_s += experts.LOOK_S
    fleet._start(queue)
    assert len(started) == running
    # What waits is unknown to Ray, whose autoscaler would start no machine for it.
    assert asked == ([3, 3, 0] if address else [])
