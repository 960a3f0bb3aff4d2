"""What a dead process has reserved on the cluster is given back, and nothing of anybody who lives."""

import time

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from linearsr_platform.cluster.reservations import release_abandoned

pytestmark = pytest.mark.ray


@ray.remote(num_cpus=0)
class Holder:
    """Reserves half a CPU, as a trainer's controller reserves its workers'."""

    def hold(self) -> str:
        group = placement_group([{"CPU": 0.5}])
        ray.get(group.ready())
        return group.id.hex()


def held() -> set[str]:
    return {group["placement_group_id"] for group in placement_group_table().values() if group["state"] == "CREATED"}


def given_back() -> int:
    """Give back until something was, because Ray notices a death in its own time."""
    end = time.monotonic() + 20
    while not (released := release_abandoned()) and time.monotonic() < end:
        time.sleep(0.2)
    return released


def test_only_what_dead_actors_have_reserved_is_given_back(cluster) -> None:
    # Of tests before this one, which share the cluster.
    release_abandoned()
    # Ray counts what a driver reserves as reserved by a dead actor.
    own = placement_group([{"CPU": 0.5}])
    ray.get(own.ready())
    dead, alive = Holder.remote(), Holder.remote()
    of_dead, of_alive = ray.get([dead.hold.remote(), alive.hold.remote()])
    assert release_abandoned() == 0
    ray.kill(dead)
    assert given_back() == 1
    assert held() & {own.id.hex(), of_dead, of_alive} == {own.id.hex(), of_alive}
    remove_placement_group(own)
    ray.kill(alive)
    assert given_back() == 1
