"""A search on real Ray: trials that stop give back what they had, nothing is trained twice, and a failing trial ends nothing but itself."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from linearsr.partition import bisection
from linearsr_platform import storage
from linearsr_platform.cluster import sweep
from linearsr_platform.cluster.board import ProgressBoard
from linearsr_platform.cluster.record import JOB_FILE, OUTCOME_FILE, claim_folder, job_hash
from linearsr_platform.cluster.trainer import fit
from linearsr_platform.cluster.warm import CHECKPOINTS, train_here
from linearsr_platform.errors import StageError, UserError
from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.recipe.schema import MachineConfig
from linearsr_platform.stages import trials
from linearsr_platform.stages.context import RunContext
from linearsr_platform.stages.plan import plan_run
from linearsr_platform.stages.search import run_search
from linearsr_platform.stages.trials import ledger_of, trial_plan

pytestmark = pytest.mark.ray
TRIALS, RUNGS = 7, (6, 12)


@pytest.fixture(scope="module")
def folder(cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search whose network is trained and profiled."""
    from tiny_search import run_to, tiny_search

    path = tmp_path_factory.mktemp("search")
    with tiny_search(path) as context:
        run_to(context, "profile")
    return path


@pytest.fixture(scope="module")
def searched(folder: Path) -> Iterator[tuple[RunContext, list[float]]]:
    """The same after its trials, and the CPUs that were free after each trial that ended."""
    from tiny_search import run_to, tiny_search
    from toy_training import CPUS, free_cpus

    free: list[float] = []
    end = sweep._Teller.on_trial_complete

    def watched(self, *args, **kwargs) -> None:
        end(self, *args, **kwargs)
        free.append(ray.available_resources().get("CPU", 0.0))

    with pytest.MonkeyPatch.context() as patch, tiny_search(folder, {"search.max_concurrent": 1}) as context:
        patch.setattr(sweep._Teller, "on_trial_complete", watched)
        run_to(context, "trials")
        assert free_cpus() == CPUS
        yield context, free


def test_every_trial_is_in_the_ledger_and_in_mlflow_once(searched) -> None:
    context, _ = searched
    records = ledger_of(context).records
    assert list(records) == [f"trial-{number:03d}" for number in range(1, TRIALS + 1)]
    assert {record.state for record in records.values()} == {"done", "stopped"}
    assert len({record.boundaries for record in records.values()}) == TRIALS
    assert records["trial-001"].origin == "bisection"
    assert all(len(record.results) == (2 if record.state == "done" else 1) for record in records.values())
    runs = context.tracker.client.search_runs(
        [context.tracker.experiment_id], filter_string=f"tags.`mlflow.parentRunId` = '{context.pipeline_run.run_id}'"
    )
    nested = {run.info.run_name: run for run in runs if run.info.run_name in records}
    assert len(nested) == len([run for run in runs if run.info.run_name.startswith("trial-")]) == TRIALS
    for name, record in records.items():
        assert nested[name].info.status == "FINISHED"
        assert nested[name].data.metrics["score"] == pytest.approx(record.results[-1].score)


def test_trials_that_end_leave_no_reservation_behind(searched) -> None:
    """One trial at a time on two CPUs: were anything kept after a stop, the other CPU would be gone soon."""
    _, free = searched
    assert len(free) == TRIALS
    assert min(free) >= 1


def test_experts_that_were_trained_before_are_not_trained_again(searched) -> None:
    context, _ = searched
    rows = ledger_of(context).rows(RUNGS, {})
    names = {storage.name_of(url) for url in storage.list_folders(trial_plan(context).store.url)}
    assert sum(row.trained for row in rows) == len(names)
    assert sum(row.trained + row.cached for row in rows) == sum(3 * len(record.results) for record in ledger_of(context).records.values())
    assert any(row.cached for row in rows)


def test_checkpoints_stay_where_another_trial_may_go_on_from_them_and_the_rest_is_what_was_planned(searched, folder: Path) -> None:
    context, _ = searched
    records = ledger_of(context).records.values()
    reached = {name for record in records if record.state == "done" for result in record.results for name in result.experts}
    stopped = {name for record in records for result in record.results for name in result.experts} - reached
    store = Path(trial_plan(context).store.url)
    assert reached
    assert stopped
    assert {path.parent.name for path in store.glob(f"*/{CHECKPOINTS}")} == stopped
    planned = plan_run(context.recipe, [MachineConfig(cpus=2)], {}, folder=str(folder))
    taken = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    assert planned.search_disk_bytes / 6 < taken < planned.search_disk_bytes


def test_a_longer_search_goes_on_where_the_shorter_one_ended(searched, folder: Path) -> None:
    from tiny_search import run_to, tiny_search

    before = ledger_of(searched[0]).records
    with tiny_search(folder, {"search.trials": TRIALS + 1}) as context:
        run_to(context, "trials")
        after = ledger_of(context).records
    assert len(after) == TRIALS + 1
    assert {name: after[name] for name in before} == before


def test_an_expert_trained_in_a_trial_is_the_one_that_a_real_trainer_makes(searched, cluster, tmp_path: Path) -> None:
    """To the bit, and also where the trial's training went on from an earlier rung."""
    context, _ = searched
    plan = trial_plan(context)
    job = plan.jobs((0.6,), 12)[0]
    board, job = ProgressBoard.start(), replace(job, output_url=str(tmp_path / "real"))
    claim_folder(job)
    real = fit(job, cluster, storage_url=str(tmp_path / "ray"), board=board)
    board.close()
    alone = [replace(plan.jobs((0.6,), steps)[0], output_url=str(tmp_path / f"warm-{steps}")) for steps in RUNGS]
    weights = storage.read_bytes(real.last_weights)
    assert ray.get(ray.remote(_trained).remote(alone[1:])) == weights
    storage.remove(alone[1].output_url)
    assert ray.get(ray.remote(_trained).remote(alone)) == weights


def _trained(jobs) -> bytes:
    import torch

    torch.set_num_threads(1)
    before = None
    for job in jobs:
        outcome = train_here(job, before=before)
        before = job
    return storage.read_bytes(outcome.last_weights)


def test_a_search_that_no_machine_has_room_for_is_refused_before_anything_is_prepared(cluster, tmp_path: Path) -> None:
    from tiny_search import tiny_search

    # A recipe of eight CPUs, which the running cluster has not: what a recipe alone gives away is refused when it is read.
    changed = {"cluster.num_cpus": 8, "cluster.cpus_per_worker": 3}
    told = r"got no room for a trial, which takes 3 CPUs and 1\.\d+ GB of memory on one machine, on a cluster whose machines have 2 CPUs, "
    with pytest.raises(UserError, match=told), tiny_search(tmp_path, changed) as context:
        run_search(context, redo_from=None, records=[])
    assert list((tmp_path / "runs").glob("tiny/*-*")) == []


@pytest.mark.parametrize(("changed", "name"), [({"search.seed": 9}, "profile"), ({"search.trials": 99}, "a trial")])
def test_a_running_cluster_that_never_has_room_is_told(searched, folder: Path, changed: dict[str, object], name: str) -> None:
    from tiny_search import run_to, tiny_search

    # An address says that the cluster may grow, or that others may leave it.
    elsewhere = {"cluster.address": "elsewhere", "cluster.cpus_per_worker": 3, "cluster.queue_timeout_s": 1}
    told = rf"{name}: found no room for 1 workers of 3 CPUs and 1\.\d+ GB of memory in 1 s; .* or lower cluster.memory_gb_per_worker"
    with pytest.raises(StageError, match=told), tiny_search(folder, {**changed, **elsewhere}) as context:
        run_to(context, "trials")


def test_a_trial_that_fails_is_told_with_its_reason_and_the_search_goes_on(folder: Path) -> None:
    from tiny_search import run_to, tiny_search

    changed = {"search.seed": 7, "experts.train.max_failures": 0, "search.trials": 3}
    with tiny_search(folder, changed) as context:
        run_to(context, "profile")
        plan = trial_plan(context)
        # What another version of the code might have left: the outcome of the first trial's first expert cannot be read.
        broken = plan.jobs(plan.grid.boundaries(plan.grid.offsets(bisection(3))), RUNGS[0])[0]
        storage.write_json(storage.join(broken.output_url, JOB_FILE), {"hash": job_hash(broken)})
        storage.write_json(storage.join(broken.output_url, OUTCOME_FILE), {"what": "is this"})
        run_to(context, "trials")
        records = ledger_of(context).records
    assert len(records) == 3
    failed = [record for record in records.values() if record.state == "failed"]
    # Named in the order in which processes came up, so known by what was broken, not by its name.
    assert [record.origin for record in failed] == ["bisection"]
    assert "fix: delete it to train" in failed[0].reason


def test_trials_whose_process_never_comes_up_are_told_as_failed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_search import run_to, tiny_search

    with tiny_search(folder, {"search.seed": 8, "experts.train.max_failures": 0, "search.trials": 2}) as context:
        run_to(context, "profile")
        # A process that cannot have so many threads ends before it has a trial.
        monkeypatch.setattr(trials, "trial_plan", lambda context: replace(trial_plan(context), threads=0))
        with pytest.raises(StageError, match=r"all 2 trials failed: .*positive integer"):
            run_to(context, "trials")


def test_the_command_compares_the_best_with_the_papers_and_leaves_a_recipe_fragment(searched, folder: Path) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("linearsr")), "search", str(folder / "tiny.yaml"), "--set", f"storage={folder / 'runs'}"],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stderr == ""
    assert "trials: skipped" in done.stdout
    report = json.loads((folder / "runs" / "tiny" / "search.json").read_text())
    labels = [one["label"] for one in report["comparisons"]]
    assert labels[0] == "best found"
    assert set(labels) == {"best found", "paper", "uniform in t", "single expert"}
    assert all(one["interval"][0] <= one["difference"] <= one["interval"][1] for one in report["comparisons"][1:])
    assert "<html" in (folder / "runs" / "tiny" / "search.html").read_text()
    used = load_recipe(str(folder / "tiny.yaml"), None, [f"storage={folder / 'runs'}", "experts.boundaries=from:tiny"])
    assert isinstance(used.recipe.experts.boundaries, tuple)
