"""A search on real Ray that loses processes: nothing trained is lost, and memory is given back between two experts."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError

from linearsr_platform import storage
from linearsr_platform.cluster.warm import CHECKPOINTS, Silence, train_here
from linearsr_platform.errors import StageError
from linearsr_platform.stages.trials import ledger_of, trial_plan

pytestmark = pytest.mark.ray
TRIALS, RUNGS = 4, (6, 12)


@pytest.fixture(scope="module")
def folder(cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search whose network is trained and profiled."""
    from tiny_search import run_to, tiny_search

    path = tmp_path_factory.mktemp("lost")
    with tiny_search(path) as context:
        run_to(context, "profile")
    return path


@pytest.fixture
def out_of_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tune is told of as many of the first results as the list says that Ray has killed their trial for want of memory."""
    left, resolved = [0], RayActorManager._actor_task_resolved

    def told(self, tracked_actor_task, result) -> None:
        if left[0] and isinstance(result, dict) and "score" in result:
            left[0] -= 1
            self._actor_task_failed(tracked_actor_task, OutOfMemoryError("killed due to the node running low on memory"))
        else:
            resolved(self, tracked_actor_task, result)

    monkeypatch.setattr(RayActorManager, "_actor_task_resolved", told)
    return left


def test_trials_that_a_full_machine_ends_go_on(folder: Path, out_of_memory: list[int]) -> None:
    from tiny_search import run_to, tiny_search
    from toy_training import CPUS, free_cpus

    out_of_memory[0], told = 2, []
    with tiny_search(folder, {"search.trials": TRIALS}) as context:
        context.display.__dict__["message"] = told.append
        run_to(context, "trials")
        records = ledger_of(context).records
        assert free_cpus() == CPUS
    assert [text for text in told if "out of memory" in text] == [
        "trials: a machine ran out of memory, and Ray ended what ran there; they go on from their checkpoints, at most 1 at once"
    ] * 2
    assert list(records) == [f"trial-{number:03d}" for number in range(1, TRIALS + 1)]
    assert {record.state for record in records.values()} <= {"done", "stopped"}
    assert len({record.boundaries for record in records.values()}) == TRIALS


def test_a_search_whose_trials_never_find_memory_ends_and_says_what_helps(folder: Path, out_of_memory: list[int]) -> None:
    from tiny_search import run_to, tiny_search
    from toy_training import CPUS, free_cpus

    out_of_memory[0] = 99
    changed = {"search.seed": 5, "experts.train.max_failures": 1, "search.trials": TRIALS}
    with (
        tiny_search(folder, changed) as context,
        pytest.raises(StageError, match=r"out of memory, and Ray ended what ran there, 2 times; fix: raise cluster\.memory_gb_per_worker"),
    ):
        run_to(context, "trials")
    assert free_cpus() == CPUS


def test_a_trial_that_is_thought_to_need_more_than_a_machine_has_is_tried(folder: Path) -> None:
    """Alone; its scoring, too, reserves what a machine has and does not wait for more."""
    from tiny_search import run_to, tiny_search

    with tiny_search(folder, {"search.seed": 6, "search.trials": 1, "cluster.memory_gb_per_worker": 99999}) as context:
        run_to(context, "trials")
        assert [record.state for record in ledger_of(context).records.values()] == ["done"]


def test_an_expert_that_is_killed_goes_on_from_its_checkpoint_and_leaves_no_network_behind(folder: Path, tmp_path: Path) -> None:
    from tiny_search import run_to, tiny_search

    with tiny_search(folder, {"experts.train.checkpoint_every": 4}) as context:
        run_to(context, "profile")
        job = trial_plan(context).jobs((0.6,), 2 * RUNGS[1])[0]
    jobs = [replace(job, output_url=str(tmp_path / name)) for name in ("whole", "killed")]
    started, engines = ray.get(ray.remote(max_calls=1)(_killed_at).remote(*jobs, 9))
    assert started == [0, 8]
    assert engines == 0
    whole, killed = (storage.read_bytes(storage.join(one.output_url, "snapshots", "step_00000012.safetensors")) for one in jobs)
    assert whole == killed
    # The last one alone stays for a longer training to go on from.
    assert [storage.name_of(url) for url in storage.list_folders(storage.join(jobs[1].output_url, CHECKPOINTS))] == ["step_00000012"]


class _Killed(Exception):
    pass


class _Kill(Silence):
    """Ends a training at a step, and remembers where trainings began."""

    def __init__(self, step: int) -> None:
        self.started: list[int] = []
        self._step: int | None = step

    def on_start(self, step: int) -> None:
        self.started.append(step)

    def on_metrics(self, step: int, values) -> None:
        if self._step is not None and step >= self._step:
            self._step = None
            raise _Killed


def _killed_at(whole, killed, step: int) -> tuple[list[int], int]:
    import torch

    torch.set_num_threads(1)
    # What Python itself would find is not to be mistaken for what was let go of.
    gc.disable()
    train_here(whole)
    observer = _Kill(step)
    with pytest.raises(_Killed):
        train_here(killed, observer=observer)
    train_here(killed, observer=observer)
    from deepspeed.runtime.engine import DeepSpeedEngine

    return observer.started, sum(isinstance(one, DeepSpeedEngine) for one in gc.get_objects())
