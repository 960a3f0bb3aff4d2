"""Reservations on the cluster: one to see whether there is room, and those that nobody will ever give back."""

import logging

import ray
from ray._private.state import state
from ray._raylet import ActorID, PlacementGroupID
from ray.core.generated.gcs_pb2 import ActorTableData, PlacementGroupTableData  # type: ignore[attr-defined]
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from linearsr_platform.cluster.capacity import Share, no_room
from linearsr_platform.errors import StageError

HELD = ("PENDING", "PREPARED", "CREATED", "RESCHEDULING")
logger = logging.getLogger(__name__)


def wait_for_room(name: str, share: Share, limit_s: float) -> None:
    """Return once the cluster has room for a worker, which it is asked for as an autoscaler hears it; nothing is kept.

    A task of Ray's and a trial of Tune's wait for ever for machines that never come, without a word.

    Args:
        name: of what is to run, for the message.
        share: of the worker.
        limit_s: how long to wait.

    Raises:
        StageError: if there was no room for so long.
    """
    group = placement_group([share.resources])
    try:
        if not group.wait(limit_s):
            raise StageError(f"{name}: {no_room(1, share, limit_s)}")
    finally:
        remove_placement_group(group)


def release_abandoned() -> int:
    """Remove what dead actors of this process's job have reserved, and return how many reservations that were.

    Ray keeps an actor's placement group until its job ends too, and the trainer that starts again would wait for ever. Ray Train's own
    helper, which our trainers leave out, is a process of its own for each, and knows of a reservation only once all workers have started.
    The public table does not say whose a group is.
    """
    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    released = 0
    for raw in state._connect_and_get_accessor().get_placement_group_table():  # noqa: SLF001 (its public form leaves the creator out)
        group = PlacementGroupTableData.FromString(raw)
        held = PlacementGroupTableData.PlacementGroupState.Name(group.state) in HELD
        if held and not group.is_detached and group.creator_job_id == job and _by_dead_actor(group):
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
            released += 1
    if released:
        logger.info("gave back %d reservations of processes that were lost", released)
    return released


def _by_dead_actor(group: PlacementGroupTableData) -> bool:
    # What no actor has reserved, but the driver or a task, counts as reserved by a dead one.
    if not group.creator_actor_id or ActorID(group.creator_actor_id).is_nil():
        return False
    if group.creator_actor_dead:
        return True
    # Ray may miss that when it kills an actor whose owner was lost.
    found = state._connect_and_get_accessor().get_actor_info(ActorID(group.creator_actor_id))  # noqa: SLF001 (as above)
    return found is None or ActorTableData.FromString(found).state == ActorTableData.DEAD
