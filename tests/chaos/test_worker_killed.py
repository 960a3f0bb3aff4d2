"""A worker is killed in the middle of a run: it costs at most one checkpoint interval, and nothing but time."""

import os
import signal
import sys
from pathlib import Path

import pytest
import ray

from linearsr_platform.cluster.board import ProgressBoard
from linearsr_platform.cluster.experts import TrainerFailure, fit_all

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed" / "toy"))

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
STEPS, INTERVAL, KILLED_AT = 24, 10, 12


def test_a_killed_worker_costs_at_most_one_checkpoint_interval(tmp_path: Path) -> None:
    from ray.util.state import list_actors
    from toy_training import free_cpus, toy_cluster, toy_job

    events, workers = [], []

    def kill_one(new) -> None:
        if any(event.kind == "start" for event in new) and not events:
            # The address, because others may run a cluster on this machine too.
            address = ray.get_runtime_context().gcs_address
            actors = list_actors(address, filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")])
            workers.extend(actor.pid for actor in actors)
        before = {event.step for event in events}
        events.extend(new)
        if KILLED_AT not in before and any(event.step == KILLED_AT for event in new):
            os.kill(workers[-1], signal.SIGKILL)

    with toy_cluster() as cluster:
        job = toy_job(tmp_path, "pretrain", workers=2, pause_s=0.15, max_steps=STEPS, log_every=1, checkpoint_every=INTERVAL)
        board = ProgressBoard.start()
        outcome = fit_all([job], cluster, storage_url=str(tmp_path / "ray"), board=board, on_poll=kill_one)["pretrain"]
        board.close()
        assert not isinstance(outcome, TrainerFailure), outcome
        assert outcome.steps == STEPS
        assert free_cpus() == 2

    second = [index for index, event in enumerate(events) if event.kind == "start"][1]
    first_run, second_run = events[:second], events[second:]
    assert 0 < max(event.step for event in first_run) - second_run[0].step <= INTERVAL

    before, after = ({event.step: event.values["loss"] for event in run if event.kind == "metrics"} for run in (first_run, second_run))
    repeated = before.keys() & after.keys()
    assert repeated
    assert {step: before[step] for step in repeated} == {step: after[step] for step in repeated}
    assert sorted(before.keys() | after.keys()) == list(range(1, STEPS + 1))
