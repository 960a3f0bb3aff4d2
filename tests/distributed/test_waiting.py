"""Trainers that wait for room, and one whose first start fails: the cluster's CPUs are given back, and nobody waits for ever."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import ray

from linearsr_platform.cluster.board import ProgressBoard
from linearsr_platform.cluster.capacity import Share
from linearsr_platform.cluster.experts import TrainerFailure, fit_all
from linearsr_platform.cluster.record import claim_folder
from linearsr_platform.cluster.reservations import wait_for_room
from linearsr_platform.cluster.trainer import fit
from linearsr_platform.errors import StageError

pytestmark = pytest.mark.ray


def controllers() -> set[int]:
    """Return the processes that control trainers."""
    from ray.util.state import list_actors

    alive = list_actors(ray.get_runtime_context().gcs_address, filters=[("state", "=", "ALIVE")])
    return {actor.pid for actor in alive if actor.class_name == "TrainController"}


def cpu_s(pid: int) -> float:
    """Return the CPU time that a process has had."""
    import psutil

    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def test_a_trainer_whose_worker_dies_while_the_group_meets_starts_anew_on_a_full_cluster(
    cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dying_join import MARK, DyingJoin
    from toy_training import free_cpus, toy_job

    monkeypatch.setattr("linearsr_platform.cluster.trainer.LateTorch", partial(DyingJoin, folder=str(tmp_path)))
    board, events = ProgressBoard.start(), []
    job = toy_job(tmp_path, "unlucky", workers=2, max_failures=0)
    impatient = cluster.model_copy(update={"queue_timeout_s": 12.0})
    claim_folder(job)
    # In a thread: in the main one Ray takes over Ctrl-C for good.
    with ThreadPoolExecutor(1) as thread:
        outcome = thread.submit(fit, job, impatient, storage_url=str(tmp_path / "ray"), board=board).result()
    events.extend(board.drain())
    board.close()

    assert (tmp_path / MARK).exists()
    assert [event.step for event in events if event.kind == "start"] == [0]
    assert outcome.steps == 20
    assert free_cpus() == 2


def test_an_elastic_trainer_without_room_gives_up_in_time(cluster, tmp_path: Path) -> None:
    from toy_training import toy_job

    # Three are more than the cluster has. An address says that others may leave it, or that it may grow.
    impatient = cluster.model_copy(update={"queue_timeout_s": 3.0, "address": "elsewhere"})
    job, board = toy_job(tmp_path, "elastic", workers=4, min_workers=3, batch_size=12), ProgressBoard.start()
    result = fit_all([job], impatient, storage_url=str(tmp_path / "ray"), board=board, on_poll=lambda _: None)["elastic"]
    board.close()
    assert isinstance(result, TrainerFailure), result
    assert result.message == (
        "elastic: found no room for 3 workers of 1 CPUs in 3 s; fix: wait for other work to end, or raise cluster.queue_timeout_s"
    )


def test_an_elastic_trainer_that_was_killed_takes_the_place_of_its_former_self(cluster, tmp_path: Path) -> None:
    """What it had asked for would count for three minutes, longer than it waits here."""
    from toy_training import free_cpus, toy_job

    before, killed, workers = controllers(), [], []

    def kill(new) -> None:
        workers.extend(event.values["workers"] for event in new if event.kind == "start")
        if not killed and any(event.kind == "checkpoint" for event in new):
            killed.extend(controllers() - before)
            os.kill(killed[0], signal.SIGKILL)

    impatient = cluster.model_copy(update={"queue_timeout_s": 60.0})
    job, board = toy_job(tmp_path, "elastic", workers=2, min_workers=1, pause_s=0.2), ProgressBoard.start()
    outcome = fit_all([job], impatient, storage_url=str(tmp_path / "ray"), board=board, on_poll=kill)["elastic"]
    board.close()
    assert not isinstance(outcome, TrainerFailure), outcome
    assert workers == [2, 2]
    assert outcome.steps == 20
    assert free_cpus() == 2


def test_looking_for_room_ends_in_time_and_keeps_nothing(cluster) -> None:
    from toy_training import free_cpus

    with pytest.raises(StageError, match="a trial: found no room for 1 workers of 3 CPUs in 1 s; fix: wait for other work to end"):
        wait_for_room("a trial", Share(cpus=3), 1.0)
    wait_for_room("a trial", Share(cpus=2), 60.0)
    assert free_cpus() == 2


def test_a_trainer_that_waits_takes_no_core_and_can_be_cancelled(cluster, tmp_path: Path) -> None:
    from toy_training import toy_job

    before, looked = controllers(), []

    def leave(_) -> None:
        looked.extend((time.monotonic(), cpu_s(pid)) for pid in controllers() - before)
        # The first seconds are its start.
        if looked and looked[-1][0] > looked[0][0] + 6:
            raise KeyboardInterrupt

    somewhere = cluster.model_copy(update={"address": "elsewhere"})
    job, board = toy_job(tmp_path, "elastic", workers=4, min_workers=3, batch_size=12), ProgressBoard.start()
    with pytest.raises(KeyboardInterrupt):
        fit_all([job], somewhere, storage_url=str(tmp_path / "ray"), board=board, on_poll=leave)
    board.close()
    later = [(at, used) for at, used in looked if at > looked[-1][0] - 2]
    assert later[-1][1] - later[0][1] < 0.5 * (later[-1][0] - later[0][0])
    end = time.monotonic() + 10
    while (left := controllers() - before) and time.monotonic() < end:
        time.sleep(0.2)
    assert not left
