"""Processes of running trainings are killed, under ZeRO 1, 2 and 3 at once: it costs time, and at most one checkpoint interval."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.slow]
SEED = 5


def controllers() -> set[int]:
    """Process ids of Ray Train's controllers, those of trainers that have ended included: Ray lets go of them in its own time."""
    import ray
    from ray.util.state import list_actors

    alive = [("class_name", "=", "TrainController"), ("state", "=", "ALIVE")]
    return {actor.pid for actor in list_actors(ray.get_runtime_context().gcs_address, filters=alive)}


@pytest.fixture(scope="module")
def cluster(undisturbed: Path) -> Iterator[object]:
    from toy_training import toy_cluster

    with toy_cluster() as config:
        yield config


def test_one_worker_of_each_at_a_random_step(cluster, undisturbed: Path, tmp_path: Path) -> None:
    from three_stages import INTERVAL, STEPS, Watch, assert_equal, jobs_of, note, pids_of, train
    from toy_training import free_cpus

    jobs = jobs_of(tmp_path)
    chance = random.Random(SEED)
    due = {job.name: chance.randrange(INTERVAL + 1, STEPS - 3) for job in jobs}

    def kill_one(watch: Watch) -> None:
        for name in [name for name, step in due.items() if watch.step(name) >= step]:
            os.kill(chance.choice(pids_of(tmp_path, name)), signal.SIGKILL)
            del due[name]

    watch = Watch(kill_one)
    train(jobs, cluster, tmp_path, watch)
    note("a worker", watch, [job.name for job in jobs])
    for job in jobs:
        ((steps, _),) = watch.lost(job.name)
        # The checkpoint of the interval may still have been on its way.
        assert 0 <= steps < 2 * INTERVAL
    assert_equal(tmp_path, undisturbed, [job.name for job in jobs])
    assert free_cpus() == 2


@pytest.mark.parametrize("victim", ["TrainController", "_train"])
def test_what_drives_each_trainer(cluster, undisturbed: Path, tmp_path: Path, victim: str) -> None:
    """The controller is Ray Train's, the task `_train` is ours around it."""
    import ray
    from ray.util.state import list_tasks
    from three_stages import INTERVAL, Watch, assert_equal, jobs_of, note, train
    from toy_training import free_cpus

    jobs = jobs_of(tmp_path)
    earlier = controllers()
    killed: list[int] = []

    def kill_drivers(watch: Watch) -> None:
        if killed or any(watch.checkpoints.get(job.name, 0) < INTERVAL for job in jobs):
            return
        if victim == "_train":
            address = ray.get_runtime_context().gcs_address
            tasks = list_tasks(address, filters=[("name", "=", victim), ("state", "=", "RUNNING")], detail=True)
            killed.extend(task.worker_pid for task in tasks)
        else:
            killed.extend(controllers() - earlier)
        assert len(killed) == len(jobs)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    watch = Watch(kill_drivers)
    train(jobs, cluster, tmp_path, watch)
    note(f"the process that drives it ({victim})", watch, [job.name for job in jobs])
    assert sum("was lost" in message for message in watch.messages) == len(jobs)
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
