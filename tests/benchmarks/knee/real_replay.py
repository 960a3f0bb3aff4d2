"""Feeds recorded curves to the detector and to its rivals, and compares what they choose with what hindsight knows.

Run: `python tests/benchmarks/knee/real_replay.py`. Needs numpy only: the curves are in `curves/`, `real_curves.py` recorded them.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rivals
from numpy.typing import NDArray

from linearsr.knee import KneeDecision, KneeDetector

Array = NDArray[np.float64]
Points = list[tuple[int, dict[str, float]]]

CURVES = Path(__file__).parent / "curves"
ORIENTATIONS = {"psnr_y": True, "ssim_y": True, "gmsd": False, "fsim": True, "val_loss": False}
VOTING = ("psnr_y", "ssim_y", "gmsd")
"""The metrics that vote in a recipe unless it says otherwise."""
RULES = (
    "patience 5",
    "patience 10",
    "patience 20",
    "GL 5 %",
    "GL 20 %",
    "PQ 0.5",
    "UP 2",
    "UP 3",
    "argmax (hindsight)",
    "Kneedle (hindsight)",
)
SMOOTHING = 2
"""Evaluations on each side that hindsight averages over."""


@dataclass(frozen=True)
class Hindsight:
    """What the finished curve says about itself, by a rule that shares no code with the detector."""

    earliest: int
    """Step of the earliest evaluation within one standard error of the best: the knee K."""
    best: int
    """Step of the best evaluation of the smoothed composite."""
    onset: int | None
    """Step of the last evaluation within three standard errors of the best, if five or more come after it: decline is certain."""

    fall: Array
    """How far each evaluation of the smoothed composite lies under the best, as a share of how far the last one does."""

    def holds_safe(self, step: int, every: int) -> bool:
        """Tell whether a checkpoint lies in the safe window [0.65 K, onset + 1 evaluation]."""
        return step >= 0.65 * self.earliest and (self.onset is None or step <= self.onset + every)


def read_points(file: Path) -> Points:
    """Read a curve: (step, values) in order."""
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return [(int(row["step"]), {name: float(text) for name, text in row.items() if name != "step" and text}) for row in rows]


def composite(points: Points, metrics: Sequence[str]) -> Array:
    """Return the mean over metrics, each oriented and in spreads (median 0, p90 - p10 = 1) of the whole curve."""
    columns = []
    for name in metrics:
        values = np.array([point[name] for _, point in points]) * (1 if ORIENTATIONS[name] else -1)
        low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
        columns.append((values - middle) / (high - low))
    return np.mean(columns, axis=0)


def hindsight(points: Points, metrics: Sequence[str] = VOTING) -> Hindsight:
    """Judge the finished curve: a centred mean over five evaluations, and noise from second differences."""
    values, steps = composite(points, metrics), [step for step, _ in points]
    smooth = np.array([values[max(0, i - SMOOTHING) : i + SMOOTHING + 1].mean() for i in range(len(values))])
    # Median of the absolute second difference of white noise of deviation 1: 0.6745 sqrt(6).
    noise = float(np.median(np.abs(np.diff(values, 2)))) / 1.652
    error = noise / np.sqrt(2 * SMOOTHING + 1)
    best = int(smooth.argmax())
    earliest = int(np.flatnonzero(smooth >= smooth[best] - error)[0])
    within = int(np.flatnonzero(smooth >= smooth[best] - 3 * error)[-1])
    onset = steps[within] if len(steps) - 1 - within >= 5 else None
    depth = smooth[best] - smooth
    return Hindsight(steps[earliest], steps[best], onset, depth / depth[-1] if depth[-1] > 0 else depth)


def replay(points: Points, metrics: Sequence[str] = VOTING) -> KneeDecision:
    """Feed the detector one evaluation at a time; returns its confirmation, or its conclusion where it never confirms."""
    detector = KneeDetector({name: ORIENTATIONS[name] for name in metrics})
    for step, values in points:
        decision = detector.update(step, {name: values[name] for name in metrics})
        if decision.state == "confirmed":
            break
    return detector.conclude()


def describe(name: str, points: Points, metrics: Sequence[str]) -> str:
    """Return one line of the table."""
    known, decision = hindsight(points, metrics), replay(points, metrics)
    every, last = points[1][0] - points[0][0], points[-1][0]
    saved = "" if decision.confirmed_at is None else f"{1 - decision.confirmed_at / last:.0%}"
    safe = "" if decision.knee_step is None else ("yes" if known.holds_safe(decision.knee_step, every) else "NO")
    interval = "" if decision.interval is None else f"{decision.interval[0]}-{decision.interval[1]}"
    cells = [name, known.earliest, known.best, known.onset, decision.state, decision.knee_step, interval, decision.onset_step]
    given_up = "" if decision.knee_step is None else f"{known.fall[[step for step, _ in points].index(decision.knee_step)]:.0%}"
    cells += [decision.confirmed_at, saved, safe, given_up if decision.state == "confirmed" else ""]
    for metric in ("psnr_y", "gmsd"):
        values = dict(points)
        sign = 1 if ORIENTATIONS[metric] else -1
        top = max(point[metric] * sign for point in values.values()) * sign
        chosen = "" if decision.knee_step is None else f"{values[decision.knee_step][metric]:.4g}"
        cells.append(f"{chosen} / {top:.4g} / {values[last][metric]:.4g}")
    return "| " + " | ".join("-" if cell is None else str(cell) for cell in cells) + " |"


COLUMNS = (
    *("curve", "K", "best", "onset", "state", "knee", "90 % interval", "onset found", "confirmed at", "saved", "safe", "given up"),
    *("PSNR-Y knee / best / last", "GMSD knee / best / last"),
)
"""K, best and onset are hindsight's. `saved`: steps not taken. `given up`: of what the curve loses from its best to its end, how much the
knee has lost (or not yet gained)."""


def rival_lines(curves: dict[str, Points], metrics: Sequence[str]) -> list[str]:
    """Return, for every rule, what it selects and where it stops on each curve."""
    orientations = {name: ORIENTATIONS[name] for name in metrics}
    lines = ["| rule | " + " | ".join(curves) + " |", "|---" * (len(curves) + 1) + "|"]
    decisions = {name: replay(points, metrics) for name, points in curves.items()}
    ours = (f"{decision.knee_step} ({decision.confirmed_at or 'never'})" for decision in decisions.values())
    lines.append("| ours | " + " | ".join(ours) + " |")
    for rule, choose in rivals.RIVALS.items():
        cells = []
        for points in curves.values():
            choice = choose([(step, {name: values[name] for name in metrics}) for step, values in points], orientations)
            cells.append(f"{choice.selected} ({choice.stopped_at or 'never'})")
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    """Print both tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, default=CURVES, help="folder of curves")
    parser.add_argument("--metrics", nargs="+", default=list(VOTING), choices=list(ORIENTATIONS), help="metrics that vote")
    arguments = parser.parse_args()
    curves = {file.stem: read_points(file) for file in sorted(arguments.curves.glob("*.csv"))}
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for name, points in curves.items():
        print(describe(name, points, arguments.metrics))
    averaged = {name: points for name, points in curves.items() if name.endswith("ema-strips")}
    print("\nselected step (stopped at), averaged weights on the strips")
    print("\n".join(rival_lines(averaged, arguments.metrics)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
