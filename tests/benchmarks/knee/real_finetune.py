"""Fine-tunes from several checkpoints of one run at equal cost, and compares where they end.

Every start gets the same steps, the same crops in the same order, the same noise and a fresh optimizer; only the weights differ.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from real_training import Data, Setting, read_curve, train

from linearsr_platform.train.loop import SNAPSHOT_FOLDER

EVERY = {"validate_every": 100}
HELD_OUT = ("photographs", "strips")
TARGETS = {
    setting.name: setting
    for setting in (
        Setting(name="high-quality", split="high-quality", watch=HELD_OUT, raw=False, train=EVERY),
        Setting(name="unseen", split="unseen", watch=("unseen", "photographs"), raw=False, train=EVERY),
        Setting(name="high-quality-10x-lr", split="high-quality", watch=HELD_OUT, raw=False, train={**EVERY, "lr": 3e-3}),
        Setting(
            name="high-quality-4x-steps", split="high-quality", watch=HELD_OUT, raw=False, train={"max_steps": 1600, "validate_every": 400}
        ),
    )
}
"""The quickstart's own fine-tuning; the same on five grey photographs that no run has seen; ten times its learning rate; four times its
steps."""
HIGHER = {"psnr_y": True, "ssim_y": True, "gmsd": False, "fsim": True, "val_loss": False}
COLUMNS = ("target", "run", "start", "start_step", "fine_tune_seed", "set", "step", *HIGHER)


@dataclass(frozen=True)
class Trial:
    """One fine-tuning: from a snapshot of a run, on a target."""

    target: str
    run: str
    """Folder of the run it starts from: setting and seed."""
    start: str
    """What the checkpoint is: `knee` of the detector, `best` in hindsight, `last`, or `untrained`."""
    start_step: int
    seed: int

    @property
    def folder(self) -> str:
        """Where it is kept, below the work folder: one for two starts at the same step."""
        return f"finetune/{self.target}/{self.run}-{self.start_step}-{self.seed}"


def fine_tune(data: Data, trial: Trial, work: Path) -> None:
    """Run one trial unless it is finished."""
    weights = work / trial.run / SNAPSHOT_FOLDER / f"step_{trial.start_step:08d}.safetensors"
    train(data, TARGETS[trial.target], trial.seed, work / trial.folder, init_weights=weights)


def collect(work: Path, trials: Sequence[Trial]) -> list[dict[str, object]]:
    """Return every validation of the trials that have any, as rows of `COLUMNS`."""
    rows: list[dict[str, object]] = []
    for trial in trials:
        head = {"target": trial.target, "run": trial.run, "start": trial.start, "start_step": trial.start_step}
        head["fine_tune_seed"] = trial.seed
        for which in TARGETS[trial.target].watch:
            file = work / trial.folder / f"ema-{which}.csv"
            rows += [{**head, "set": which, **row} for row in read_curve(file)] if file.exists() else []
    return rows


def write_rows(file: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write collected rows as CSV."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows)


def read_rows(file: Path) -> list[dict[str, object]]:
    """Read what `write_rows` wrote."""
    whole = ("fine_tune_seed", "start_step", "step")
    with file.open(newline="", encoding="utf-8") as stream:
        return [
            {name: int(text) if name in whole else float(text) if name in HIGHER else text for name, text in row.items()}
            for row in csv.DictReader(stream)
        ]


def comparison(rows: Sequence[Mapping[str, object]]) -> Iterator[str]:
    """Yield the lines of a table: for each target, set and step, where knee and last checkpoint ended and by how much they differ.

    The difference is taken between trials that share run and fine-tuning seed, averaged over fine-tuning seeds, and given as mean and
    standard deviation over the runs, which are what is independent. Positive is better for the knee.
    """
    yield "| target | measured on | after | runs x seeds | " + " | ".join(f"{name}: knee, last, gain" for name in HIGHER) + " |"
    yield "|---" * (4 + len(HIGHER)) + "|"
    groups: dict[tuple, dict[str, dict[tuple, Mapping]]] = {}
    for row in rows:
        sides = groups.setdefault((_setting(row["run"]), row["target"], row["set"], row["step"]), {"knee": {}, "last": {}})
        if row["start"] in sides:
            sides[str(row["start"])][row["run"], row["fine_tune_seed"]] = row
    for (setting, target, which, step), sides in groups.items():
        pairs: dict[str, list[tuple[Mapping, Mapping]]] = {}
        for run, seed in sorted(sides["knee"].keys() & sides["last"].keys()):
            pairs.setdefault(run, []).append((sides["knee"][run, seed], sides["last"][run, seed]))
        if pairs:
            cells = [f"{setting} -> {target}", which, step, f"{len(pairs)} x {max(map(len, pairs.values()))}"]
            yield "| " + " | ".join(map(str, [*cells, *(_cell(pairs, name) for name in HIGHER)])) + " |"


def levels(rows: Sequence[Mapping[str, object]]) -> Iterator[str]:
    """Yield the lines of a table: where every start gets to on `high-quality` with fine-tuning seed 0, as means over the runs."""
    yield "| start | measured on | after | " + " | ".join(HIGHER) + " |"
    yield "|---" * (3 + len(HIGHER)) + "|"
    ours = [row for row in rows if row["target"] == "high-quality" and row["fine_tune_seed"] == 0]
    last = max(int(row["step"]) for row in ours)
    groups: dict[tuple, list[Mapping]] = {}
    for row in ours:
        groups.setdefault((_setting(row["run"]), row["set"], row["start"], row["step"]), []).append(row)
    for (setting, which, start, step), here in sorted(groups.items()):
        if step in (0, last):
            cells = [f"{np.mean([row[name] for row in here]):.4g}" for name in HIGHER]
            yield f"| {setting} {start} | {which} | {step} | " + " | ".join(cells) + " |"


def _setting(run: object) -> str:
    return str(run).rsplit("-", 1)[0]


def _cell(pairs: Mapping[str, Sequence[tuple[Mapping, Mapping]]], name: str) -> str:
    """Return the means of both and the mean gain with its deviation over runs."""
    knee, last = (float(np.mean([np.mean([pair[side][name] for pair in group]) for group in pairs.values()])) for side in (0, 1))
    sign = 1 if HIGHER[name] else -1
    gains = [sign * float(np.mean([pair[0][name] - pair[1][name] for pair in group])) for group in pairs.values()]
    spread = f" +- {np.std(gains, ddof=1):.2g}" if len(gains) > 1 else ""
    return f"{knee:.4g}, {last:.4g}, {np.mean(gains):+.3g}{spread}"
