"""What `linearsr plan` says, against what then happens.

Run: `python tests/benchmarks/plan.py` (6 minutes on 2 quiet cores). The quickstart's networks are trained shortly, which gives their pace;
then a longer run is planned from it, and run. Prints time of each training stage and memory of its workers, planned and measured. The
planned pace is only as good as the machine is steady: other work in one of the two runs shows as an error of the plan. So the longer run is
planned a second time, with the crops a second that its steps then had: what is off there is the plan's own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "pipelines" / "quickstart.yaml")
STAGES = {"pretrain": "pretrain", "experts": "experts.train", "finetune": "finetune.train"}
WORKER = "ray::RayTrainWorker"


def settings(name: str, storage: str, steps: dict[str, int]) -> list[str]:
    """Bound stages by steps, and let no knee end them before."""
    lines = [f"name={name}", f"storage={storage}"]
    for stage, key in STAGES.items():
        lines += [f"{key}.max_steps={steps[stage]}", f"{key}.max_seconds=null", f"{key}.knee.stop=false"]
    return [word for line in lines for word in ("--set", line)]


def linearsr(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "linearsr_platform", *arguments]


def plan(folder: str, steps: dict[str, int], *rates: str) -> dict[str, Any]:
    """Plan a run of so many steps from the short one, or with given rates."""
    command = linearsr("plan", QUICKSTART, *settings("paced", folder, steps), "--json", *rates)
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def rates_of(results: dict[str, Any]) -> list[str]:
    """Return options that give a plan the crops a second of each stage's trainers."""
    found = {}
    for stage in STAGES:
        trainers = results[stage]["data"]["trainers"].values()
        found[stage] = sum(trainer["samples_per_s"] for trainer in trainers) / len(trainers)
    return [word for stage, rate in found.items() for word in ("--rate", f"{stage}={rate}")]


def run_watched(arguments: list[str], stage_of: "StageWatch") -> None:
    """Run a recipe, and note the memory of its workers while it lasts."""
    process = subprocess.Popen(linearsr("run", QUICKSTART, *arguments), stdout=subprocess.PIPE, text=True)
    watcher = threading.Thread(target=stage_of.watch, args=(process.pid,), daemon=True)
    watcher.start()
    assert process.stdout is not None
    for line in process.stdout:
        words = line.split()
        if len(words) > 2 and words[1].rstrip(":") in STAGES and words[2] == "started":
            stage_of.stage = words[1].rstrip(":")
    if process.wait():
        raise SystemExit(f"the run failed with {process.returncode}")
    stage_of.over = True
    watcher.join()


class StageWatch:
    """The largest resident memory of a worker, by stage."""

    def __init__(self) -> None:
        self.stage = ""
        self.over = False
        self.peaks: dict[str, dict[int, int]] = defaultdict(dict)

    def watch(self, driver: int) -> None:
        while not self.over:
            for process in psutil.process_iter(["cmdline", "memory_info"]):
                command = process.info["cmdline"] or [""]
                if command[0].startswith(WORKER) and self._belongs(process, driver):
                    peaks = self.peaks[self.stage]
                    peaks[process.pid] = max(peaks.get(process.pid, 0), process.info["memory_info"].rss)
            time.sleep(0.5)

    @staticmethod
    def _belongs(process: psutil.Process, driver: int) -> bool:
        try:
            return driver in [parent.pid for parent in process.parents()]
        except psutil.Error:
            return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", type=int, default=80, help="steps of each stage in the run that measures")
    parser.add_argument("--long", type=int, default=400, help="steps of each stage in the run that is planned")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="linearsr-plan-") as folder:
        short, long = (dict.fromkeys(STAGES, steps) for steps in (arguments.short, arguments.long))
        subprocess.run(linearsr("run", QUICKSTART, *settings("paced", folder, short)), check=True, stdout=subprocess.DEVNULL)
        planned = plan(folder, long)
        watch = StageWatch()
        run_watched(settings("planned", folder, long), watch)
        results = {
            path.parent.name.rpartition("-")[0]: json.loads(path.read_text()) for path in Path(folder, "planned").glob("*/result.json")
        }
        again = plan(folder, long, *rates_of(results))
    print("stage     time, s: planned measured  ratio  at its own rate  ratio | memory of a worker, GB: planned measured  ratio")
    worst_time, worst_memory, worst_own = 1.0, 1.0, 1.0
    for stage, own in zip(planned["training"], again["training"], strict=True):
        name, memory = stage["stage"], stage["memory"]
        expected = sum(memory.values())
        got = max(watch.peaks[name].values())
        seconds, took = stage["seconds"], results[name]["seconds"]
        worst_time = max(worst_time, seconds / took, took / seconds)
        worst_own = max(worst_own, own["seconds"] / took, took / own["seconds"])
        worst_memory = max(worst_memory, expected / got, got / expected)
        print(
            f"{name:<9} {seconds:16.1f} {took:8.1f}  {seconds / took:5.2f} {own['seconds']:16.1f}  {own['seconds'] / took:5.2f}"
            f" | {expected / 1e9:31.2f} {got / 1e9:8.2f}  {expected / got:5.2f}"
        )
    print(
        f"time within {worst_time - 1:.0%} (bar 25 %), at its own rate {worst_own - 1:.0%}, memory within {worst_memory - 1:.0%} (bar 15 %)"
    )
    raise SystemExit(worst_time > 1.25 or worst_memory > 1.15)


if __name__ == "__main__":
    main()
