"""Train the quickstart's network for a quarter of an hour while something breaks every 20 to 40 s, and check what it came to.

    python tests/chaos/soak.py --minutes 15 --seed 0

Photographs, network, degradation and optimizer are those of `pipelines/quickstart.yaml`; steps instead of seconds bound it, so that
two trainings are the same. Shards, checkpoints and results are on an S3 server on loopback. First the training is done undisturbed,
on a local cluster, and then again on a cluster of two nodes. What breaks is drawn: a worker, the process that drives the trainer, its
controller, a node (another one comes 5 s later), or storage, which then fails 10 % of its calls until the next fault. Faults stop when
the time is over. The tolerance is none: last weights and history of validations must be the same bit for bit. At the end no CPU may be
reserved, and no process that comes from here, no new `/tmp/linearsr-*` and no new segment in `/dev/shm` may be left.
"""
# ruff: noqa: E402 (what tests share has no package, so its folders come first)

import argparse
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import ray

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "distributed" / "toy"), str(HERE.parent / "support")]

from flaky_s3 import FlakyS3, flaky_s3
from nodes import Nodes, homes, several_nodes
from three_stages import Watch

from linearsr_platform import storage
from linearsr_platform.cluster.board import ProgressBoard
from linearsr_platform.cluster.experts import fit_all
from linearsr_platform.cluster.session import cluster_session
from linearsr_platform.recipe.schema import ClusterConfig
from linearsr_platform.train.job import TrainJob
from linearsr_platform.train.outcome import TrainOutcome

RECIPE = HERE.parents[1] / "pipelines" / "quickstart.yaml"
EVERY_S, AWAY_S, GONE_S, FAILING = (20.0, 40.0), 5.0, 150.0, 0.1
"""Ray's own last processes go two minutes after the rest."""
MARK = "LINEARSR_SOAK"
"""Environment variable by which processes that come from here are known, whoever their parent is now."""
STEPS_PER_MINUTE = 500
"""About as many as get done between faults on two cores. Faults stop when the time is over, so that too many steps only make it longer."""


def drivers(kind: str) -> list[int]:
    """Return the processes that run the task `_train` or Ray Train's controller."""
    from ray.util.state import list_actors, list_tasks

    address = ray.get_runtime_context().gcs_address
    if kind == "_train":
        tasks = list_tasks(address, filters=[("func_or_class_name", "=", kind), ("state", "=", "RUNNING")], detail=True)
        return [task.worker_pid for task in tasks if task.worker_pid]
    actors = list_actors(address, filters=[("class_name", "=", kind), ("state", "=", "ALIVE")])
    return [actor.pid for actor in actors]


class Faults:
    """What breaks, and when."""

    def __init__(self, seed: int, minutes: float, nodes: Nodes, server: FlakyS3) -> None:
        self._draws, self._nodes, self._server = random.Random(seed), nodes, server
        self._end = time.monotonic() + 60 * minutes
        self._next = time.monotonic() + self._draws.uniform(*EVERY_S)
        self._node_due: float | None = None
        self.done: Counter[str] = Counter()
        self.kinds: dict[str, Callable[[], bool]] = {
            "worker": lambda: self._kill([pid for pids in homes().values() for pid in pids]),
            "driving task": lambda: self._kill(drivers("_train")),
            "controller": lambda: self._kill(drivers("TrainController")),
            "node": self._lose_node,
            "storage": self._spoil_storage,
        }

    def __call__(self, watch: Watch) -> None:
        now = time.monotonic()
        if self._node_due is not None and now >= self._node_due:
            self._nodes.add()
            self._node_due = None
        if now < self._next:
            return
        self._next = now + self._draws.uniform(*EVERY_S)
        self._server.share = 0.0
        if now >= self._end:
            return
        kind = self._draws.choice(list(self.kinds))
        happened = self.kinds[kind]()
        self.done[kind] += happened
        print(f"{time.strftime('%H:%M:%S')} step {watch.step('pretrain')}: {kind}{'' if happened else ': there is none now'}", flush=True)

    def _kill(self, pids: list[int]) -> bool:
        if pids:
            os.kill(self._draws.choice(pids), signal.SIGKILL)
        return bool(pids)

    def _lose_node(self) -> bool:
        if self._node_due is not None:
            return False
        self._nodes.lose(self._draws.choice(self._nodes.workers()))
        self._node_due = time.monotonic() + AWAY_S
        return True

    def _spoil_storage(self) -> bool:
        self._server.share = FAILING
        return True


def quickstart_job(folder: Path, bucket: str, steps: int) -> TrainJob:
    """Prepare the photographs, with their shards on S3, and return the job that pretraining is."""
    from linearsr_platform.cli.execute import open_context
    from linearsr_platform.cli.progress import make_display
    from linearsr_platform.recipe.load import load_recipe
    from linearsr_platform.stages.jobs import make_job
    from linearsr_platform.stages.pipeline import STAGES, run_stages
    from linearsr_platform.stages.pretrain import measure

    changed = [f"storage={bucket}/runs", f"tracking.uri=sqlite:///{folder}/mlflow.db", f"data.cache_folder={folder}/cache"]
    changed += [f"pretrain.max_steps={steps}", "pretrain.max_seconds=null", "pretrain.knee.stop=false", "pretrain.log_every=5"]
    changed += ["pretrain.checkpoint_every=50", f"pretrain.validate_every={max(50, steps // 8)}", "pretrain.max_failures=200"]
    with ExitStack() as closing, make_display() as display:
        context = open_context(load_recipe(str(RECIPE), None, changed), display, closing, verbose=False)
        with context.pipeline_run:
            run_stages(context, {"prepare": STAGES["prepare"]}, redo_from=None, records=[])
            return make_job(
                context,
                name="pretrain",
                url=storage.join(bucket, "undisturbed"),
                train=context.recipe.pretrain,
                interval=(0.0, 1.0),
                statistics=measure(context),
            )


def train(job: TrainJob, cluster: ClusterConfig, storage_url: str, watch: Watch) -> TrainOutcome:
    """Train to the end."""
    board = ProgressBoard.start()
    try:
        outcome = fit_all([job], cluster, storage_url=storage_url, board=board, on_poll=watch)[job.name]
    finally:
        board.close()
    assert isinstance(outcome, TrainOutcome), outcome
    return outcome


def left_over(before: set[str]) -> list[str]:
    """Return what of this program is still there: its processes, and new temporary files and shared memory that nobody else uses."""
    mine, used = [], set()
    for process in psutil.process_iter():
        try:
            ours = process.environ().get(MARK) == os.environ[MARK] and process.pid != os.getpid()
            names = [Path(link).readlink() for link in Path(f"/proc/{process.pid}/fd").iterdir()] if not ours else []
            mapped = Path(f"/proc/{process.pid}/maps").read_text() if not ours else ""
        except (OSError, psutil.Error):  # It ended meanwhile.
            continue
        if ours:
            mine.append(f"process {process.pid} {process.name()}")
        used |= {path for path in temporary() if path in mapped or any(str(name).startswith(path) for name in names)}
    return mine + sorted(temporary() - before - used)


def temporary() -> set[str]:
    """Return everything on this machine that a training may leave in files."""
    return {str(path) for pattern in ("tmp/linearsr-*", "dev/shm/*") for path in Path("/").glob(pattern)}


def soak(minutes: float, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train twice and compare."""
    with flaky_s3(seed=seed) as server:
        os.environ.update(server.environment)
        bucket = server.make_bucket("soak")
        job = quickstart_job(folder, bucket, steps)
        local = ClusterConfig(num_cpus=2, cpus_per_worker=1.0, object_store_mb=100)
        with cluster_session(local):
            whole = train(job, local, storage.join(bucket, "ray-undisturbed"), Watch(lambda watch: None))
        print(f"undisturbed: {whole.steps} steps in {whole.seconds:.0f} s", flush=True)
        disturbed = replace(job, output_url=storage.join(bucket, "disturbed", job.name))
        with several_nodes(2) as nodes:
            faults = Faults(seed, minutes, nodes, server)
            watch = Watch(faults)
            outcome = train(disturbed, nodes.config, storage.join(bucket, "ray-disturbed"), watch)
            server.share = 0.0
            end = time.monotonic() + 20
            while (free := ray.available_resources().get("CPU", 0.0)) < len(nodes.workers()) and time.monotonic() < end:
                time.sleep(0.5)
            reserved = len(nodes.workers()) - free
        hashes = {sha256(storage.read_bytes(one.last_weights)).hexdigest() for one in (whole, outcome)}
        lost = watch.lost(job.name)
        return {
            "steps": outcome.steps,
            "seconds": [round(whole.seconds), round(outcome.seconds)],
            "faults": dict(faults.done),
            "restarts": len(lost),
            "steps_lost": sum(steps for steps, _ in lost),
            "requests_failed": server.faults.total(),
            "same_weights": len(hashes) == 1,
            "same_history": whole.history == outcome.history,
            "reserved_cpus": reserved,
        }


def main() -> int:
    """Soak; 0 if all is well."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15.0, help="how long faults happen")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--steps", type=int, help=f"of both trainings; default {STEPS_PER_MINUTE} a minute")
    arguments = parser.parse_args()
    os.environ[MARK] = str(os.getpid())
    before = temporary()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # The S3 server says every request.
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp") as folder:
        steps = arguments.steps or round(STEPS_PER_MINUTE * arguments.minutes)
        found = soak(arguments.minutes, arguments.seed, steps, Path(folder))
    end = time.monotonic() + GONE_S
    while (left := left_over(before)) and time.monotonic() < end:
        time.sleep(1)
    print(json.dumps({**found, "left_over": left}, indent=2))
    return 0 if found["same_weights"] and found["same_history"] and found["reserved_cpus"] == 0 and not left else 1


if __name__ == "__main__":
    sys.exit(main())
