"""On a cluster with an autoscaler several experts, or trials, make it grow until they run side by side, and let it shrink afterwards."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray
Cluster = tuple[str, dict[str, str]]
# Not on the standard output, where Ray writes to every driver that something waits for a machine.
ANSWER = """
import sys
from pathlib import Path
address, folder = sys.argv[1], Path(sys.argv[2])

def answer(*words):
    (folder / "answer").write_text(" ".join(map(str, words)))
"""
EXPERTS = """
from linearsr_platform.cluster.board import ProgressBoard
from linearsr_platform.cluster.experts import fit_all
from linearsr_platform.cluster.session import cluster_session
from linearsr_platform.recipe.schema import ClusterConfig
from toy_training import toy_job

cluster, told = ClusterConfig(address=address, cpus_per_worker=1.0, queue_timeout_s=60.0), []
with cluster_session(cluster):
    board = ProgressBoard.start()
    jobs = [toy_job(folder, name, pause_s=0.8, task="MeetingToyTask", pids=True) for name in ("one", "two")]
    fit_all(jobs, cluster, storage_url=str(folder / "ray"), board=board, on_poll=told.extend)
    board.close()
answer(*[event.kind for event in told if event.kind in ("start", "end")])
"""
TRIALS = """
import threading, time
from linearsr_platform.cluster.experts import machines
from tiny_search import run_to, tiny_search

def watch():
    while True:
        seen.append(sum(node.cpus for node in machines()))
        time.sleep(0.5)

seen = []
with tiny_search(folder, {"cluster.address": address, "search.max_concurrent": 2, "search.trials": 2, "search.rungs": [6]}) as context:
    run_to(context, "profile")
    threading.Thread(target=watch, daemon=True).start()
    run_to(context, "trials")
    answer(seen[0], max(seen))
"""
NODES = """
import time, ray
ray.init(address=address, log_to_driver=False, logging_level="ERROR")
end = time.monotonic() + 90
while (count := sum(node["Alive"] for node in ray.nodes())) > 1 and time.monotonic() < end:
    time.sleep(0.5)
answer(count)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    from growing import growing_cluster

    with growing_cluster(2) as started:
        yield started


def told(code: str, cluster: Cluster, folder: Path) -> str:
    """Run Python code in another process, since this one may be on another cluster, and return what it passes to `answer`."""
    address, environment = cluster
    command = [sys.executable, "-c", ANSWER + code, address, str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return (folder / "answer").read_text()


def test_experts_make_a_cluster_grow_until_all_of_them_train(cluster: Cluster, tmp_path: Path) -> None:
    assert told(EXPERTS, cluster, tmp_path) == "start start end end"
    # Asked for no longer, idle machines go.
    assert told(NODES, cluster, tmp_path) == "1"


@pytest.mark.nightly
def test_trials_make_a_cluster_grow_to_as_many_as_the_recipe_wants_at_once(cluster: Cluster, tmp_path: Path) -> None:
    assert told(TRIALS, cluster, tmp_path) == "1.0 2.0"
