"""Processes of running trainings are killed, under ZeRO 1, 2 and 3 at once: it costs time, and at most one checkpoint interval."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.slow]
SEED = 5
VICTIMS = ("worker", "TrainController", "_train")


def controllers() -> set[int]:
    """Process ids of Ray Train's controllers, those of trainers that have ended included: Ray lets go of them in its own time."""
    import ray
    from ray.util.state import list_actors

    alive = [("class_name", "=", "TrainController"), ("state", "=", "ALIVE")]
    return {actor.pid for actor in list_actors(ray.get_runtime_context().gcs_address, filters=alive)}


def drivers(kind: str, trainer: str) -> list[int]:
    """Return the process that runs a trainer's task `_train`, or the controller which that has started; none while Ray does not know it."""
    import ray
    from ray.util.state import list_tasks

    address = ray.get_runtime_context().gcs_address
    tasks = list_tasks(address, filters=[("name", "=", f"train {trainer}"), ("state", "=", "RUNNING")], detail=True)
    if kind == "TrainController":
        made = list_tasks(address, filters=[("name", "=", "TrainController.__init__")], detail=True)
        tasks = [one for one in made if one.parent_task_id in {task.task_id for task in tasks}]
    return [task.worker_pid for task in tasks if task.worker_pid]


@pytest.fixture(scope="module")
def cluster(undisturbed: Path) -> Iterator[object]:
    from toy_training import toy_cluster

    with toy_cluster() as config:
        yield config


@pytest.mark.parametrize("turn", [0, *(pytest.param(turn, marks=pytest.mark.nightly) for turn in (1, 2))])
def test_each_trainer_loses_another_process_at_a_random_step(cluster, undisturbed: Path, tmp_path: Path, turn: int) -> None:
    """A worker, Ray Train's controller, or the task of ours that drives it; after three turns each trainer has lost each of them."""
    from three_stages import INTERVAL, STEPS, Watch, assert_equal, jobs_of, note, pids_of, train
    from toy_training import free_cpus

    # Slow enough for a busy machine to find the process before its trainer is done.
    jobs = jobs_of(tmp_path, pause_s=0.4)
    chance = random.Random(SEED + turn)
    due = {job.name: chance.randrange(INTERVAL + 1, STEPS // 2) for job in jobs}
    victims = {job.name: VICTIMS[(turn + place) % len(VICTIMS)] for place, job in enumerate(jobs)}

    def kill(watch: Watch) -> None:
        for name in [name for name, step in due.items() if watch.step(name) >= step]:
            found = pids_of(tmp_path, name) if victims[name] == "worker" else drivers(victims[name], name)
            if found:
                os.kill(chance.choice(found), signal.SIGKILL)
                del due[name]

    watch = Watch(kill)
    train(jobs, cluster, tmp_path, watch)
    assert not due
    for job in jobs:
        note(victims[job.name], watch, [job.name])
        ((steps, _),) = watch.lost(job.name)
        # The checkpoint of the interval may still have been on its way.
        assert 0 <= steps < 2 * INTERVAL
    # Ray Train starts a worker again by itself.
    lost = [message.partition(":")[0] for message in watch.messages if "was lost" in message]
    assert sorted(lost) == [name for name, victim in victims.items() if victim != "worker"]
    assert_equal(tmp_path, undisturbed, [job.name for job in jobs])
    assert free_cpus() == 2


def test_a_controller_before_all_workers_have_started(cluster, tmp_path: Path) -> None:
    """Ray Train does not know yet what to give back, and the trainer that starts again needs all that there is."""
    from ray.util.placement_group import placement_group_table
    from three_stages import STEPS, Watch, jobs_of, train
    from toy_training import free_cpus

    (job,) = jobs_of(tmp_path, stages=(1,), pause_s=0.0)
    killed: list[int] = []

    earlier = controllers()

    def kill_early(watch: Watch) -> None:
        if killed or not any(group["state"] == "CREATED" for group in placement_group_table().values()):
            return
        assert not watch.starts
        killed.extend(controllers() - earlier)
        os.kill(killed[0], signal.SIGKILL)

    watch = Watch(kill_early)
    train([job], cluster, tmp_path, watch, cpus=1.0)
    assert len(killed) == 1
    assert watch.step(job.name) == STEPS
    assert free_cpus() == 2
