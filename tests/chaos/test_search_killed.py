"""A search loses its driver three times and a trial's process once: every trial is counted once, and nothing is left running."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed" / "toy"))

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.slow]
TRIALS, KILLS = 8, 3
TRIAL_PROCESS = "ray::ResourceTrainable"
"""How Ray calls the process of a trial."""


class Driver:
    """`linearsr search` as a process of its own."""

    def __init__(self, folder: Path) -> None:
        command = [str(Path(sys.executable).with_name("linearsr")), "search", str(folder / "tiny.yaml")]
        command += ["--set", f"storage={folder / 'runs'}", "--set", f"search.trials={TRIALS}"]
        self.log = (folder / "driver.log").open("a")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, how: signal.Signals) -> list[psutil.Process]:
        """Send a signal, wait for the end and return what is still running of its cluster half a minute later."""
        children = self.children()
        self.process.send_signal(how)
        self.process.wait(60)
        self.log.close()
        _, left = psutil.wait_procs(children, timeout=30)
        return left


def wait_for(condition: Callable[[], bool], driver: Driver, folder: Path, limit_s: float = 180.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert driver.process.poll() is None, (folder / "driver.log").read_text()[-4000:]
        assert time.monotonic() < end, (folder / "driver.log").read_text()[-4000:]
        time.sleep(0.1)


def test_a_search_survives_its_driver_and_its_trials(tmp_path: Path) -> None:
    from tiny_search import RECIPE

    from linearsr_platform.stages.ledger import Ledger

    (tmp_path / "tiny.yaml").write_text(RECIPE)
    home = tmp_path / "runs" / "tiny"

    def ledger() -> Ledger:
        found = list(home.glob("trials-*/ledger"))
        return Ledger(str(found[0]) if found else str(tmp_path / "none"))

    def reports() -> int:
        return sum(len(record.results) for record in ledger().records.values())

    draws = random.Random(4)
    for _ in range(KILLS):
        driver, before = Driver(tmp_path), reports()
        wait_for(lambda before=before: reports() > before, driver, tmp_path)
        time.sleep(draws.uniform(0, 4))
        ended = {record.name: record for record in ledger().ended}
        assert driver.end(signal.SIGKILL) == []
        assert ended.items() <= ledger().records.items()
        assert len(ledger().ended) < TRIALS

    driver, before = Driver(tmp_path), reports()
    wait_for(lambda: reports() > before, driver, tmp_path)
    workers = [child for child in driver.children() if child.name().startswith(TRIAL_PROCESS) or TRIAL_PROCESS in " ".join(child.cmdline())]
    assert workers
    workers[0].send_signal(signal.SIGKILL)
    wait_for(lambda: bool(list(home.glob("trials-*/result.json"))), driver, tmp_path)
    assert driver.end(signal.SIGINT) == []
    assert driver.process.returncode == 130

    records = ledger().records
    assert list(records) == [f"trial-{number:03d}" for number in range(1, TRIALS + 1)]
    assert {record.state for record in records.values()} <= {"done", "stopped"}
    assert len({record.boundaries for record in records.values()}) == TRIALS
    for record in records.values():
        assert [result.steps for result in record.results] in ([4, 8], [4])
    assert_in_mlflow_once(home, set(records))


def assert_in_mlflow_once(home: Path, names: set[str]) -> None:
    """One parent run, resumed each time, and one nested run a trial."""
    from linearsr_platform.tracking.store import connect, default_uri

    client = connect(default_uri(str(home.parent)))
    (experiment,) = [one for one in client.search_experiments() if one.name == "tiny"]
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    assert len([run for run in runs if run.data.tags.get("kind") == "pipeline"]) == 1
    trials = [run for run in runs if run.info.run_name.startswith("trial-")]
    assert sorted(run.info.run_name for run in trials) == sorted(names)
    assert {run.info.status for run in trials} == {"FINISHED"}
    parent = json.loads((home / "search-run.json").read_text())["run_id"]
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {parent}
