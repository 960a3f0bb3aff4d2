"""Real curves: trains the quickstart's network far past its knee, shows what the detector chooses, and fine-tunes from knee and end.

Run: `OMP_NUM_THREADS=1 python tests/benchmarks/knee/real_curves.py WORK_FOLDER`. About 80 minutes of one CPU core; what is finished
below WORK_FOLDER is not done again. With `--record` the curves and the results of fine-tuning go into the repository, where the recorded
ones came from. Without WORK_FOLDER it only prints the tables of those, in seconds.
"""

import argparse
import shutil
import sys
from pathlib import Path
from time import monotonic

import real_finetune
import real_fragility
import real_replay
import torch
from real_finetune import Trial
from real_settings import RUNS, SETTINGS
from real_training import load_data, train

HERE = Path(__file__).parent
RECIPE = HERE.parents[2] / "pipelines" / "quickstart.yaml"
RESULTS = HERE / "real_finetune.csv"
DECISIVE = "ema-strips"
"""Averaged weights on strips of the training photographs: what the platform decides on."""
FINE_TUNE_SEEDS = {"high-quality": (0, 1, 2), "unseen": (0, 1, 2), "high-quality-10x-lr": (0,), "high-quality-4x-steps": (0,)}
"""Fine-tunings of every run on a target, by seed."""


def train_all(data, work: Path, curves: Path) -> None:
    """Do every run of `RUNS`, and copy its curves."""
    curves.mkdir(parents=True, exist_ok=True)
    for name, seed in RUNS:
        started_s = monotonic()
        folder = work / f"{name}-{seed}"
        train(data, SETTINGS[name], seed, folder)
        for file in folder.glob("*-*.csv"):
            shutil.copyfile(file, curves / f"{folder.name}-{file.name}")
        print(f"{folder.name}: {monotonic() - started_s:.0f} s", flush=True)


def starts(curves: Path) -> dict[str, dict[str, int]]:
    """Return for each run the steps of four checkpoints: the detector's knee, the best in hindsight, the last and the first."""
    found = {}
    for name, seed in RUNS:
        points = real_replay.read_points(curves / f"{name}-{seed}-{DECISIVE}.csv")
        knee = real_replay.replay(points).knee_step
        last = points[-1][0]
        best = real_replay.hindsight(points).best
        found[f"{name}-{seed}"] = {"knee": last if knee is None else knee, "best": best, "last": last, "untrained": 0}
    return found


def trials(steps: dict[str, dict[str, int]]) -> list[Trial]:
    """Return the fine-tunings: knee against last on every target, and for comparison from the hindsight best and from no training."""
    plan = [(target, seed) for target, seeds in FINE_TUNE_SEEDS.items() for seed in seeds]
    pairs = [Trial(target, run, start, at[start], seed) for target, seed in plan for run, at in steps.items() for start in ("knee", "last")]
    others = [Trial("high-quality", run, start, at[start], 0) for run, at in steps.items() for start in ("best", "untrained")]
    return [*pairs, *others]


def fine_tune_all(data, work: Path, steps: dict[str, dict[str, int]], results: Path) -> None:
    """Do every fine-tuning and write the results as they come."""
    planned = trials(steps)
    for trial in planned:
        real_finetune.fine_tune(data, trial, work)
        real_finetune.write_rows(results, real_finetune.collect(work, planned))
        print(trial.folder, flush=True)


def main() -> int:
    """Train, fine-tune and print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="?", type=Path, metavar="WORK_FOLDER", help="folder for shards, runs and fine-tunings")
    parser.add_argument("--record", action="store_true", help="write curves and results into the repository instead of WORK_FOLDER")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = None if arguments.work is None else arguments.work.resolve()
    recorded = arguments.record or work is None
    curves, results = (real_replay.CURVES, RESULTS) if recorded else (work / "curves", work / RESULTS.name)
    if work is not None:
        data = load_data(RECIPE, work)
        train_all(data, work, curves)
        fine_tune_all(data, work, starts(curves), results)
    rows = real_finetune.read_rows(results)
    print("\n".join([*real_finetune.comparison(rows), "", *real_finetune.levels(rows)]))
    if work is not None:
        print("\n".join(["", "rise of val_loss under noise on the weights", *real_fragility.comparison(data, work, starts(curves))]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
