"""A search on a running cluster loses its driver, also three times, and a trial: each trial counts once, nothing stays reserved."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from ports import free_port

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed" / "toy"))

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.slow]
RUNGS, CPUS = [150, 300], 2
TRIAL_PROCESS = "ray::ResourceTrainable"
"""How Ray calls the process of a trial."""
AUTHENTICATION = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[str, psutil.Process]]:
    """A cluster of one machine that nobody's driver has started; its address and its process."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--head",
            "--block",
            "--node-ip-address=127.0.0.1",
            f"--port={port}",
        ]
        command += [f"--num-cpus={CPUS}", "--object-store-memory=100000000", f"--temp-dir={folder}", "--disable-usage-stats"]
        command += [f"--dashboard-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0"]
        with Path(folder, "head.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **AUTHENTICATION})
        try:
            yield f"127.0.0.1:{port}", psutil.Process(process.pid)
        finally:
            children = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            process.wait(60)
            for child in psutil.wait_procs(children, timeout=20)[1]:
                child.kill()


FREE = """
import json, sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
end = time.monotonic() + 60
while (free := ray.available_resources().get("CPU", 0.0)) < float(sys.argv[2]) and time.monotonic() < end:
    time.sleep(0.2)
print(free)
"""


def free_cpus(address: str) -> float:
    """Return the CPUs that nobody has reserved, once all are free or a minute is over; asked from another process."""
    told = subprocess.run(
        [sys.executable, "-c", FREE, address, str(CPUS)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **AUTHENTICATION},
    )
    return float(told.stdout)


class Driver:
    """`linearsr search` as a process of its own."""

    def __init__(self, folder: Path, address: str, trials: int) -> None:
        command = [str(Path(sys.executable).with_name("linearsr")), "search", str(folder / "tiny.yaml")]
        command += [
            "--set",
            f"storage={folder / 'runs'}",
            "--set",
            f"search.trials={trials}",
            "--set",
            f"search.rungs={RUNGS}",
            "--set",
            f"cluster.address={address}",
        ]
        # Where tests run in the background, Ctrl-C is ignored, and children would inherit that.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        with (folder / "driver.log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **AUTHENTICATION})
        signal.signal(signal.SIGINT, before)

    def end(self, how: signal.Signals) -> None:
        """Send a signal and wait for the end."""
        self.process.send_signal(how)
        self.process.wait(90)


def wait_for(condition: Callable[[], bool], driver: Driver, folder: Path, limit_s: float = 600.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert driver.process.poll() is None, (folder / "driver.log").read_text()[-4000:]
        assert time.monotonic() < end, (folder / "driver.log").read_text()[-4000:]
        time.sleep(0.1)


@pytest.mark.parametrize(("kills", "trials"), [(1, 6), pytest.param(3, 12, marks=pytest.mark.nightly)])
def test_a_search_survives_its_driver_and_its_trials(head: tuple[str, psutil.Process], tmp_path: Path, kills: int, trials: int) -> None:
    from tiny_search import RECIPE

    from linearsr_platform.stages.ledger import Ledger

    address, cluster = head
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    home = tmp_path / "runs" / "tiny"

    def ledger() -> Ledger:
        found = list(home.glob("trials-*/ledger"))
        return Ledger(str(found[0]) if found else str(tmp_path / "none"))

    def reports() -> int:
        return sum(len(record.results) for record in ledger().records.values())

    draws = random.Random(4)
    for _ in range(kills):
        driver, before = Driver(tmp_path, address, trials), reports()
        wait_for(lambda before=before: reports() > before, driver, tmp_path)
        time.sleep(draws.uniform(0, 3))
        ended = {record.name: record for record in ledger().ended}
        driver.end(signal.SIGKILL)
        assert free_cpus(address) == CPUS
        assert ended.items() <= ledger().records.items()
        assert len(ledger().ended) < trials

    driver, before = Driver(tmp_path, address, trials), reports()
    wait_for(lambda: reports() > before, driver, tmp_path)
    workers = [child for child in cluster.children(recursive=True) if TRIAL_PROCESS in " ".join(child.cmdline())]
    assert workers
    workers[0].send_signal(signal.SIGKILL)
    wait_for(lambda: bool(list(home.glob("trials-*/result.json"))), driver, tmp_path)
    driver.end(signal.SIGINT)
    assert driver.process.returncode == 130
    assert free_cpus(address) == CPUS

    records = ledger().records
    assert list(records) == [f"trial-{number:03d}" for number in range(1, trials + 1)]
    assert {record.state for record in records.values()} <= {"done", "stopped"}
    assert len({record.boundaries for record in records.values()}) == trials
    for record in records.values():
        assert [result.steps for result in record.results] in (RUNGS, RUNGS[:1])
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
