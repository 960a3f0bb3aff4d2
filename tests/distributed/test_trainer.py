"""One trainer with two real workers: Ray Train, DeepSpeed ZeRO-2 over gloo, shards, checkpoints, outcome; and what is refused."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError
from safetensors.torch import load_file

from linearsr.guard import Trip
from linearsr_platform.cluster.board import Event, ProgressBoard
from linearsr_platform.cluster.capacity import Room, Share, fits
from linearsr_platform.cluster.experts import TrainerFailure, fit_all
from linearsr_platform.cluster.failures import explain
from linearsr_platform.cluster.record import checkpoints_url
from linearsr_platform.cluster.rehearsal import global_batch, read_draws
from linearsr_platform.cluster.session import package_folders
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.train_schema import ZeroConfig
from linearsr_platform.train.checkpoint_contents import newest_checkpoint, whole
from linearsr_platform.train.checkpoint_store import names_in
from linearsr_platform.train.job import Rehearsal

pytestmark = pytest.mark.ray


def actors() -> dict[int, str]:
    """Return the processes of the actors that live, and of which class they are."""
    from ray.util.state import list_actors

    return {actor.pid: actor.class_name for actor in list_actors(ray.get_runtime_context().gcs_address, filters=[("state", "=", "ALIVE")])}


def holding_torch(before: set[int]) -> dict[str, set[bool]]:
    """Return of each class of actor that was not there before whether its processes hold torch."""
    found: dict[str, set[bool]] = {}
    for pid, kind in actors().items():
        if pid not in before:
            found.setdefault(kind, set()).add("libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text())
    return found


def test_two_workers_train_and_a_second_call_starts_nothing(cluster, tmp_path: Path) -> None:
    from toy_training import free_cpus, toy_job

    job, board, events = toy_job(tmp_path, "pretrain", workers=2, pause_s=0.3), ProgressBoard.start(), []
    # The cluster is shared: what tests before this one have left is not looked at.
    before = set(actors())
    processes: dict[str, set[bool]] = {}

    def watch(new: list[Event]) -> None:
        events.extend(new)
        if not processes and any(event.kind == "metrics" for event in new):
            processes.update(holding_torch(before))

    outcome = fit_all([job], cluster, storage_url=str(tmp_path / "ray"), board=board, on_poll=watch)["pretrain"]

    # Ray Train's own processes hold no torch, and there are no more of them than it takes.
    assert processes.pop("RayTrainWorker") == {True}
    assert processes.keys() <= {"TrainController", "SynchronizationActor", "_AutoscalingCoordinatorActor", "_Board"}
    assert not any(True in held for held in processes.values()), processes
    assert not isinstance(outcome, TrainerFailure), outcome
    assert outcome.steps == 20
    assert load_file(outcome.last_weights)["weight"].shape == (3, 3, 3, 3)
    assert outcome.history[-1]["psnr_y"] > outcome.history[0]["psnr_y"] + 3
    steps = {
        kind: [event.step for event in events if event.kind == kind] for kind in ("start", "metrics", "validation", "checkpoint", "end")
    }
    assert steps == {
        "start": [0],
        "metrics": [5, 10, 15, 20],
        "validation": [0, 10, 20],
        "checkpoint": [5, 10, 15, 20],
        "end": [20],
    }
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert list((tmp_path / "ray").iterdir()) == []
    assert free_cpus() == 2

    again = fit_all([job], cluster, storage_url=str(tmp_path / "ray"), board=board, on_poll=events.extend)["pretrain"]
    assert again == outcome
    assert events[-1].kind == "end"
    board.close()


def test_a_trip_of_the_guard_reaches_the_driver_and_training_goes_on_from_a_checkpoint_of_its_own(cluster, tmp_path: Path) -> None:
    from toy_training import toy_job

    job = toy_job(tmp_path, "guarded", task="PoisonedToyTask", workers=2, max_steps=40, checkpoint_every=20)
    board, events = ProgressBoard.start(), []
    outcome = fit_all([job], cluster, storage_url=str(tmp_path / "ray"), board=board, on_poll=events.extend)["guarded"]
    board.close()

    assert not isinstance(outcome, TrainerFailure), outcome
    (event,) = [event for event in events if event.kind == "trip"]
    trip = Trip(**event.detail)
    assert (event.step, trip.step, trip.statistic, trip.rolled_back_to) == (20, 27, "loss", 20)
    assert outcome.trips == [event.detail]
    assert [event.step for event in events if event.kind == "checkpoint"] == [20, 20, 40]
    assert outcome.steps == 40


class DriverGone(Exception):
    """What ends a driver in the middle of a run."""


def test_a_run_goes_on_from_a_whole_checkpoint_at_another_stage_to_where_it_would_have_got(cluster, tmp_path: Path) -> None:
    from toy_training import free_cpus, toy_job

    def leave(new) -> None:
        events.extend(new)
        if len([event for event in events if event.kind == "checkpoint"]) == 2:
            raise DriverGone

    board, events, settings = ProgressBoard.start(), [], {"workers": 2, "max_steps": 40, "checkpoint_every": 10}
    first = toy_job(tmp_path, "moved", pause_s=0.1, **settings)
    with pytest.raises(DriverGone):
        fit_all([first], cluster, storage_url=str(tmp_path / "ray"), board=board, on_poll=leave)
    events.clear()
    (folder,) = (tmp_path / "ray").glob("moved-*/checkpoints")
    newest, before = names_in(str(folder))[:2]
    os.truncate(folder / newest / "rank_1.safetensors", 100)
    second = toy_job(tmp_path, "moved", pause_s=0.1, zero=ZeroConfig(stage=3), accumulation=2, max_failures=7, **settings)
    moved = fit_all([second], cluster, storage_url=str(tmp_path / "ray"), board=board, on_poll=events.extend)["moved"]
    assert [event.step for event in events if event.kind == "start"] == [int(before.removeprefix("step_"))]
    (message,) = [event.detail["text"] for event in events if event.kind == "message"]
    assert message.startswith(f"checkpoint {newest} is damaged (rank_1.safetensors has 100 bytes instead of ")
    assert message.endswith(f"going on from {before}")
    assert free_cpus() == 2
    assert list((tmp_path / "ray").iterdir()) == []

    undisturbed = fit_all(
        [toy_job(tmp_path / "other", "moved", **settings)], cluster, storage_url=str(tmp_path / "ray"), board=board, on_poll=lambda _: None
    )["moved"]
    board.close()
    assert not isinstance(moved, TrainerFailure), moved
    assert moved.messages == [message]
    assert moved.history[0] == undisturbed.history[0]
    for point, other in zip(moved.history, undisturbed.history, strict=True):
        assert point == pytest.approx(other, rel=1e-3)


def test_a_run_is_fed_and_learns_the_same_on_one_worker_and_then_on_two_again(cluster, tmp_path: Path) -> None:
    from toy_training import free_cpus, toy_job

    board, starts, losses = ProgressBoard.start(), [], {}

    def listen(new) -> None:
        starts.extend((event.step, event.values["workers"]) for event in new if event.kind == "start")
        losses.update({event.step: event.values["loss"] for event in new if event.kind == "metrics"})

    def train(folder: Path, part: str, kill: tuple[int, int] | None = None, **layout):
        settings = {"max_steps": 24, "checkpoint_every": 8, "log_every": 1, "accumulation": 1, "max_failures": 0, **layout}
        job = toy_job(folder, "moved", task="QuietToyTask", **settings)
        job = replace(job, rehearsal=Rehearsal(url=str(tmp_path / part), kill=kill))
        url = str(folder / "ray")
        result = fit_all([job], cluster, storage_url=url, board=board, on_poll=listen, keep_checkpoints=True)["moved"]
        assert isinstance(result, TrainerFailure) == (kill is not None), result
        return checkpoints_url(url, job)

    undisturbed = newest_checkpoint(train(tmp_path / "one", "undisturbed", workers=2))
    expected = dict(losses)
    starts.clear()
    losses.clear()
    train(tmp_path / "other", "first", (1, 10), workers=2, zero=ZeroConfig(stage=2))
    train(tmp_path / "other", "second", (0, 20), workers=1, zero=ZeroConfig(stage=1))
    moved = newest_checkpoint(train(tmp_path / "other", "third", workers=2, zero=ZeroConfig(stage=3)))
    board.close()

    assert starts == [(0, 2), (8, 1), (16, 2)]
    for step in range(1, 25):
        part = "first" if step <= 8 else "second" if step <= 16 else "third"
        fed = global_batch(read_draws(str(tmp_path / part), step))
        assert len(fed) == 4
        assert fed == global_batch(read_draws(str(tmp_path / "undisturbed"), step)), step
    assert losses == pytest.approx(expected, rel=0, abs=1e-5)
    for kind in ("weight", "average", "exp_avg", "exp_avg_sq"):
        ours, theirs = whole(moved, kind), whole(undisturbed, kind)
        assert ours.keys() == theirs.keys() == {"weight", "bias"}
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-5)
    assert free_cpus() == 2


def test_an_elastic_trainer_starts_with_the_workers_that_there_is_room_for(cluster, tmp_path: Path) -> None:
    from toy_training import toy_job

    job, board, events = toy_job(tmp_path, "elastic", workers=4, min_workers=1, batch_size=12), ProgressBoard.start(), []
    outcome = fit_all([job], cluster, storage_url=str(tmp_path / "ray"), board=board, on_poll=events.extend)["elastic"]
    board.close()
    assert not isinstance(outcome, TrainerFailure), outcome
    assert [event.values["workers"] for event in events if event.kind == "start"] == [2]
    assert outcome.steps == 20


def test_a_worker_that_does_not_see_the_storage_says_so_instead_of_training(cluster, tmp_path: Path) -> None:
    """As on a machine that joins a cluster later, which nobody has asked."""
    from toy_training import toy_job

    handle = os.open(tmp_path, os.O_RDONLY)
    # A path that leads there in this process alone, as to a disk of one machine.
    job = replace(toy_job(tmp_path, "lost"), output_url=f"/proc/self/fd/{handle}/out")
    board, events = ProgressBoard.start(), []
    try:
        outcome = fit_all([job], cluster, storage_url=str(tmp_path / "ray"), board=board, on_poll=events.extend)["lost"]
    finally:
        os.close(handle)
        board.close()
    assert isinstance(outcome, TrainerFailure), outcome
    assert outcome.by_user
    assert re.match(rf"lost: storage: got '{job.output_url}', which \S+ \([0-9.]+\) of the cluster cannot see; expected a", outcome.message)
    assert [event.kind for event in events] == ["end"]
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "job.json"]


def test_a_trainer_that_can_never_start_is_refused_with_the_arithmetic(cluster, tmp_path: Path) -> None:
    from toy_training import toy_job

    job, board = toy_job(tmp_path, "expert-1", workers=4), ProgressBoard.start()
    with pytest.raises(UserError, match=r"expert-1: got 4 workers of 1 CPUs each; expected at most 2, because the cluster has 2 CPUs"):
        fit_all([job], cluster, storage_url=str(tmp_path / "ray"), board=board, on_poll=lambda _: None)
    board.close()


def test_as_many_trainers_run_at_once_as_cpus_and_memory_allow(tmp_path: Path) -> None:
    from toy_training import toy_job

    job, half = toy_job(tmp_path, "expert-1"), Share(cpus=0.5)
    two_cpus = Room(nodes=(Share(cpus=2),))
    assert [fits(job, [job] * running, half, two_cpus) for running in range(5)] == [True] * 4 + [False]
    assert Room(nodes=(Share(cpus=1.5), Share(cpus=1.5))).workers(Share(cpus=1)) == 2
    assert Room(nodes=(Share(cpus=8, gpus=1),)).workers(Share(cpus=1, gpus=0.5)) == 2

    gigabyte = Share(cpus=0.5, memory_bytes=1e9)
    small = Room(nodes=(Share(cpus=2, memory_bytes=2e9),))
    assert [fits(job, [job] * running, gigabyte, small) for running in range(3)] == [True, True, False]
    assert not fits(job, [], gigabyte, Room(nodes=(Share(cpus=2, memory_bytes=9e8),) * 3))


def test_the_worker_that_died_is_blamed_and_not_those_that_lost_it() -> None:
    lost = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:4242")
    killed = WorkerHealthCheckFailedError("A worker health check failed.", RuntimeError("gone"))
    for failures, blamed in (({0: lost, 1: killed}, "a worker died"), ({0: lost, 1: OSError("disk full")}, "OSError: disk full")):
        assert str(explain("expert-3", WorkerGroupError("...", failures))).startswith(f"expert-3: {blamed}")


def test_packages_of_two_installations_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearsr.__path__", ["/elsewhere/linearsr"])
    with pytest.raises(UserError, match=r"got linearsr from /elsewhere/linearsr and linearsr_platform from .*expected one checkout"):
        package_folders()
