"""The knee detector against other stopping rules, on drawn curves whose knee is known. Prints a table in Markdown.

Run: python tests/benchmarks/knee/bench.py [--curves 120] [--seed 0] [--jobs 2] [--families NAME ...] [--metrics 1]

Columns, all shares of curves. Of those that have a knee K and an onset of oscillation or decline: `safe`, the kept evaluation lies in
[0.65 K, onset + 1]; `early`, confirmed before K; `late`, the kept evaluation lies after onset + 1; `dated`, the onset is found within
max(3 evaluations, 15 % of K), of curves whose noise grows at least threefold; `found`, confirmed at all; `delay`, median number of
evaluations from the onset to the confirmation, never counted as 40. Of those that have none: `false`, confirmed all the same.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import median

import families
from rivals import RIVALS, Choice

from linearsr.knee import KneeDetector

OURS = "knee detector"
NEVER = 40
HINDSIGHT = ("argmax", "Kneedle")
"""Begin the names of rules that see the whole curve first."""


@dataclass(frozen=True)
class Score:
    """What one rule did on one curve, in evaluations."""

    family: str
    knee: int | None
    onset: int | None
    fold: float
    selected: int | None
    confirmed: int | None
    dated: int | None

    @property
    def safe(self) -> bool:
        """Whether the kept evaluation is between the rise and the onset."""
        return self.selected is not None and 0.65 * (self.knee or 0) <= self.selected <= (self.onset or 0) + 1


def detect(points: list[tuple[int, dict[str, float]]], orientations: dict[str, bool]) -> tuple[Choice, int | None]:
    """Feed a curve to the knee detector; returns its choice and the dated onset, in steps."""
    detector = KneeDetector(orientations)
    for step, values in points:
        decision = detector.update(step, values)
        if decision.confirmed_at is not None:
            return Choice(decision.knee_step, decision.confirmed_at), decision.onset_step
    return Choice(detector.best_step(), None), None


def judge(family: str, num_metrics: int | None, seed: int) -> dict[str, Score]:
    """Draw one curve and score every rule on it."""
    curve = families.draw(family, seed, num_metrics)
    place = {step: index for index, (step, _) in enumerate(curve.points)}

    def score(choice: Choice, onset: int | None) -> Score:
        selected, confirmed, dated = (None if step is None else place[step] for step in (choice.selected, choice.stopped_at, onset))
        return Score(family, curve.knee, curve.onset, curve.fold, selected, confirmed, dated)

    scores = {OURS: score(*detect(curve.points, curve.orientations))}
    return scores | {name: score(rule(curve.points, curve.orientations), None) for name, rule in RIVALS.items()}


def share(hits: list[bool]) -> str:
    """Return the share of hits."""
    return f"{sum(hits) / len(hits):.3f}" if hits else "-"


def row_with_knee(name: str, scores: list[Score]) -> str:
    """Return the table row of curves that have a knee."""
    strong = [score for score in scores if score.fold >= 3]
    dated = [score.dated is not None and abs(score.dated - score.onset) <= max(3, 0.15 * score.knee) for score in strong]
    delays = [NEVER if score.confirmed is None else score.confirmed - score.onset for score in scores]
    cells = [
        share([score.safe for score in scores]),
        share([score.confirmed is not None and score.confirmed < score.knee for score in scores]),
        share([score.selected is not None and score.selected > score.onset + 1 for score in scores]),
        share(dated) if any(score.dated is not None for score in scores) else "-",
        share([score.confirmed is not None for score in scores]),
        f"{median(delays):g}",
    ]
    return f"| {name} | {len(scores)} | " + " | ".join(cells) + " |"


def print_tables(scores: dict[str, list[Score]], chosen: list[str]) -> None:
    """Print our rule by family, then every rule over all families."""
    ours = scores[OURS]
    head = "| n | safe | early | late | dated | found | delay |\n|---|---|---|---|---|---|---|---|"
    print(f"| curves with a knee {head}")
    for family in [name for name in chosen if name in families.WITH_KNEE]:
        print(row_with_knee(family, [score for score in ours if score.family == family]))
    common = [score for score in ours if score.knee is not None and score.family not in families.HARDER]
    print(row_with_knee("**all but growing, swinging, AR .6**", common))
    print(row_with_knee("**all**", [score for score in ours if score.knee is not None]))
    print("\n| curves without one | n | false |\n|---|---|---|")
    for family in [name for name in chosen if name in families.WITHOUT_KNEE]:
        of_family = [score for score in ours if score.family == family]
        print(f"| {family} | {len(of_family)} | {share([score.confirmed is not None for score in of_family])} |")
    print("\n| rule | n | safe | early | late | dated | found | delay | false | false, AR .6 |\n|---|---|---|---|---|---|---|---|---|---|")
    for name, of_rule in scores.items():
        without = [score for score in of_rule if score.knee is None]
        false = [
            share([s.confirmed is not None for s in without if s.family.endswith("AR .6") == correlated]) for correlated in (False, True)
        ]
        if name.startswith(HINDSIGHT):
            false = ["-", "-"]
        print(row_with_knee(name, [score for score in of_rule if score.knee is not None]) + f" {false[0]} | {false[1]} |")


def main() -> None:
    """Draw, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=int, default=120, help="curves a family")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--metrics", type=int, default=None, help="metrics a curve; 3 to 5 unless given")
    parser.add_argument("--families", nargs="*", default=[*families.WITH_KNEE, *families.WITHOUT_KNEE], help="families to draw from")
    arguments = parser.parse_args()
    scores: dict[str, list[Score]] = {}
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for family in arguments.families:
            seeds = range(arguments.seed, arguments.seed + arguments.curves)
            for judged in pool.map(partial(judge, family, arguments.metrics), seeds, chunksize=8):
                for name, score in judged.items():
                    scores.setdefault(name, []).append(score)
    print_tables(scores, arguments.families)


if __name__ == "__main__":
    main()
