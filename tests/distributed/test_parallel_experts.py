"""Several trainers on a cluster with room for two: they queue, fail alone, and resume after an interruption."""

from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import save_file

from linearsr_platform.cluster.board import ProgressBoard
from linearsr_platform.cluster.capacity import CLAMPED
from linearsr_platform.cluster.experts import TrainerFailure, fit_all, room_now
from linearsr_platform.cluster.record import job_hash

pytestmark = pytest.mark.ray


def test_one_of_four_fails_alone_and_only_it_is_trained_again(cluster, tmp_path: Path) -> None:
    from toy_training import free_cpus, toy_job

    names = [f"expert-{index}" for index in range(1, 5)]
    weights = tmp_path / "knee.safetensors"
    save_file({"weight": torch.zeros(5)}, weights)
    board, events, running, most = ProgressBoard.start(), [], set(), 0

    def watch(new) -> None:
        nonlocal most
        events.extend(new)
        for event in new:
            running.add(event.source) if event.kind == "start" else running.discard(event.source) if event.kind == "end" else None
            most = max(most, len(running))

    def fit(init: dict[str, str]) -> dict:
        jobs = [toy_job(tmp_path, name, init_weights=init.get(name)) for name in names]
        return fit_all(jobs, cluster, storage_url=str(tmp_path / "ray"), board=board, on_poll=watch)

    results = fit({"expert-2": str(weights)})
    failure = results.pop("expert-2")
    assert isinstance(failure, TrainerFailure)
    assert failure.message.startswith(f"expert-2: init_weights: got {weights}; expected the weights of this network")
    assert "load_state_dict" in failure.details
    assert {name: outcome.steps for name, outcome in results.items()} == {"expert-1": 20, "expert-3": 20, "expert-4": 20}
    assert most <= 2
    assert not any(event.source == "expert-2" and event.kind == "start" for event in events)

    events.clear()
    fixed = fit({})
    assert {name: outcome.steps for name, outcome in fixed.items()} == dict.fromkeys(names, 20)
    assert {event.source for event in events} == {"expert-2"}
    assert {name: fixed[name] for name in results} == results
    assert free_cpus() == 2
    board.close()


def test_trainers_for_which_there_is_no_memory_wait_and_one_that_wants_all_of_it_runs_alone(cluster, tmp_path: Path) -> None:
    from toy_training import toy_job

    have = room_now().nodes[0].memory_bytes
    board, ends, left = ProgressBoard.start(), [], {}

    def watch(new) -> None:
        ends.extend((event.source, event.kind) for event in new if event.kind in ("start", "end"))
        if ends and ends[-1][1] == "start":
            # The least that was seen: a trainer gives its memory back a moment before it is known to have ended.
            source = ends[-1][0]
            left[source] = min(left.get(source, have), ray.available_resources().get("memory", 0.0))

    jobs = [replace(toy_job(tmp_path, name, pause_s=0.1), memory_bytes={1: share * have}) for name, share in (("one", 0.6), ("two", 3.0))]
    assert [job_hash(job) for job in jobs] == [job_hash(replace(job, memory_bytes=None)) for job in jobs]
    for together in (jobs[:1] * 2, jobs[1:]):
        named = [replace(job, name=f"{job.name}-{index}", output_url=f"{job.output_url}-{index}") for index, job in enumerate(together)]
        fit_all(named, cluster, storage_url=str(tmp_path / "ray"), board=board, on_poll=watch)
    board.close()
    assert ends == [(name, kind) for name in ("one-0", "one-1", "two-0") for kind in ("start", "end")]
    # Ray knows of it too, so that other runs on the cluster keep away.
    expected = {"one-0": 0.4 * have, "one-1": 0.4 * have, "two-0": (1 - CLAMPED) * have}
    assert left == {source: pytest.approx(memory, rel=0.01) for source, memory in expected.items()}


def test_an_interrupted_trainer_gives_its_workers_back_and_resumes(cluster, tmp_path: Path) -> None:
    from toy_training import free_cpus, toy_job

    job, board, seen = toy_job(tmp_path, "pretrain", pause_s=0.2), ProgressBoard.start(), []

    def interrupt(new) -> None:
        if any(event.kind == "checkpoint" for event in new):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_all([job], cluster, storage_url=str(tmp_path / "ray"), board=board, on_poll=interrupt)
    assert free_cpus() == 2

    board.drain()
    outcome = fit_all([job], cluster, storage_url=str(tmp_path / "ray"), board=board, on_poll=seen.extend)["pretrain"]
    assert not isinstance(outcome, TrainerFailure), outcome
    assert outcome.steps == 20
    assert seen[0].kind == "start"
    assert seen[0].step >= 5
    board.close()
