"""What a trainer costs from its start to its end when it has hardly anything to train, beside Ray's `TorchTrainer` of the same work.

Run: `OMP_NUM_THREADS=1 python tests/benchmarks/trainer_start.py` (3 minutes on 2 quiet cores). A network of one layer trains 4 steps under
DeepSpeed on a local cluster of 2 CPUs with the settings that every session of ours has. Both sides run in turns, each started by a process
of its own, as experts are, `--at-once` trainers together. Seconds are from submission to the outcome. CPU seconds and memory (PSS) are of
Ray's processes of the trainers, sampled four times a second, so that they are a little low; memory is the largest sum at one time. Exits
with 1 if a ratio of medians is under `--least`.
"""

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import psutil
import ray

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed" / "toy"))

from toy_training import toy_cluster, toy_job

from linearsr_platform.cluster.board import ProgressBoard
from linearsr_platform.cluster.record import claim_folder
from linearsr_platform.recipe.schema import ClusterConfig
from linearsr_platform.train.job import TrainJob

OTHERS = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::_Board", "ray::_AutoscalingCoordinator")
"""Processes of the cluster, not of a trainer."""


@dataclass(frozen=True)
class Cost:
    """Of the trainers that were started together."""

    seconds: float
    cpu_s: float
    megabytes: float


@ray.remote(num_cpus=0, max_calls=1)
def start(job: TrainJob, cluster: ClusterConfig, folder: str, board: ProgressBoard, *, ours: bool) -> None:
    """Run one trainer in a process of its own."""
    if not ours:
        from ray.train.v2.torch.torch_trainer import TorchTrainer

        from linearsr_platform.cluster import trainer
        from linearsr_platform.cluster.worker import train_worker

        def torch_trainer(*arguments: object) -> TorchTrainer:
            lean = made(*arguments)
            return TorchTrainer(
                train_worker, train_loop_config=lean.train_loop_config, scaling_config=lean.scaling_config, run_config=lean.run_config
            )

        made, trainer._trainer = trainer._trainer, torch_trainer
    from linearsr_platform.cluster.trainer import fit

    claim_folder(job)
    fit(job, cluster, storage_url=f"{folder}/ray", board=board)


class Watch(threading.Thread):
    """Follows the processes of trainers."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.cpu_s: dict[int, float] = {}
        self.largest_bytes = 0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.25):
            held = 0
            for process in psutil.process_iter(["cmdline"]):
                title = " ".join(process.info["cmdline"] or [])
                if not title.startswith("ray::") or title.startswith(OTHERS):
                    continue
                try:
                    spent = process.cpu_times()
                    held += process.memory_full_info().pss
                except psutil.Error:  # It ended meanwhile.
                    continue
                self.cpu_s[process.pid] = spent.user + spent.system
            self.largest_bytes = max(self.largest_bytes, held)


def measure(jobs: list[TrainJob], run: Callable[[TrainJob], ray.ObjectRef]) -> Cost:
    """Run jobs together to their ends."""
    watch = Watch()
    watch.start()
    began = time.perf_counter()
    ray.get([run(job) for job in jobs])
    seconds = time.perf_counter() - began
    watch.ended.set()
    watch.join()
    return Cost(seconds, sum(watch.cpu_s.values()), watch.largest_bytes / 2**20)


def main() -> None:
    """Print a table and say by the exit code whether it is as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="starts of each side, after one of each to warm up")
    parser.add_argument("--at-once", type=int, default=1, help="trainers that start together")
    parser.add_argument("--least", type=float, default=1.2, help="least ratio of medians, theirs over ours")
    arguments = parser.parse_args()
    costs: dict[bool, list[Cost]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as name, toy_cluster() as cluster:
        board, folder = ProgressBoard.start(), Path(name)
        for number in range(arguments.rounds + 1):
            for ours in (True, False) if number % 2 else (False, True):
                one = toy_job(folder / f"{ours}-{number}", "one", max_steps=4, log_every=2, validate_every=4, checkpoint_every=4)
                jobs = [replace(one, name=f"job-{i}", output_url=f"{one.output_url}-{i}") for i in range(arguments.at_once)]
                cost = measure(jobs, lambda job, ours=ours: start.remote(job, cluster, str(folder / str(ours)), board, ours=ours))
                if number:
                    costs[ours].append(cost)
        board.close()
    print(f"{'':<12} {'seconds':>9} {'CPU s':>9} {'MB':>9}")
    medians = {
        ours: [median(column) for column in zip(*((cost.seconds, cost.cpu_s, cost.megabytes) for cost in found), strict=True)]
        for ours, found in costs.items()
    }
    for label, ours in (("TorchTrainer", False), ("ours", True)):
        print(f"{label:<12} " + " ".join(f"{value:9.1f}" for value in medians[ours]))
    ratios = [theirs / own for theirs, own in zip(medians[False], medians[True], strict=True)]
    print(f"{'ratio':<12} " + " ".join(f"{ratio:9.2f}" for ratio in ratios))
    sys.exit(any(ratio < arguments.least for ratio in ratios))


if __name__ == "__main__":
    main()
