"""What a search over expert boundaries shows, as frozen dataclasses that turn into JSON. Reads no file and knows no cluster."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import floor, isfinite, log10
from typing import Any, Literal

from linearsr.noise_profile import NoiseProfile
from linearsr.partition import Proposal
from linearsr_platform.json_numbers import null_for_nan
from linearsr_platform.report.markup import metric_label

TrialState = Literal["queued", "running", "stopped", "done", "failed"]
"""`stopped` is by the scheduler, at a rung."""
Verdict = Literal["better", "worse", "no difference", "not known", "reference"]
"""`not known` is of scores that are not all finite."""

OPPOSITE: dict[Verdict, Verdict] = {
    "better": "worse",
    "worse": "better",
    "no difference": "no difference",
    "not known": "not known",
    "reference": "reference",
}
"""The verdict seen from the other side."""
REFERENCES = {"paper": "the paper's boundaries", "uniform in t": "boundaries uniform in t", "single expert": "a single expert"}
"""Label of what the search must beat -> how a sentence names it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRow:
    """One set of boundaries that was tried, and how far it got."""

    name: str
    boundaries: tuple[float, ...]
    """Ascending noise levels; empty for a single network."""
    origin: str
    """Name of a proposal, or `search`."""
    state: TrialState
    rung: int
    """Optimizer steps behind the score, all experts together."""
    rungs: int
    """Optimizer steps of the last rung."""
    score: float | None
    score_error: float | None
    """Standard error of the score's gain over the network that all experts start from, crop by crop: what crops have in common cancels."""
    trained: int
    """Trainings of an expert that this trial ran."""
    cached: int
    """Trainings of an expert that it took from an earlier trial."""
    seconds: float
    doing: str = ""
    """What it does at this moment, such as `expert 2 of 4`."""
    reason: str = ""
    """Why it failed."""

    @property
    def has_score(self) -> bool:
        """Whether there is a finite score to rank it by."""
        return self.score is not None and isfinite(self.score)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One set of boundaries in the final comparison, trained again with several seeds."""

    label: str
    boundaries: tuple[float, ...]
    seeds: int
    score: float
    """Mean over seeds."""
    score_error: float
    difference: float | None
    """Score minus the reference's, over pairs of the same seed and image; None for the reference itself."""
    interval: tuple[float, float] | None
    """Confidence interval of the difference, 95 % for all comparisons together."""
    verdict: Verdict
    """Against the reference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrast:
    """How the best boundaries found score against others."""

    label: str
    """Of the others."""
    difference: float
    """Score of the best found minus the others'."""
    interval: tuple[float, float] | None
    verdict: Verdict
    """`better` if the best found are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchReport:
    """Everything in the report of a search but its pictures."""

    name: str
    metric: str
    higher_is_better: bool
    trials: tuple[TrialRow, ...]
    proposals: tuple[Proposal, ...]
    comparisons: tuple[Comparison, ...]
    """The best that the trials found first, which is the reference, then the others, best first. Empty if nothing was compared."""
    best: TrialRow | None
    profile: NoiseProfile | None
    trained: int
    """Trainings of an expert that were run."""
    cached: int
    """Trainings of an expert that were asked for again and taken from the store."""
    seconds: float
    started: str
    """ISO 8601 time with offset."""
    start: float | None = None
    """Score of the network that all experts start from, on the same crops; None if it was not measured."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values; numbers that are not finite become None."""
        fields = asdict(self) | {"profile": None if self.profile is None else self.profile.to_json()}
        finite: dict[str, Any] = null_for_nan(fields)
        return finite

    @property
    def winner(self) -> Comparison | None:
        """What a recipe should use: the best that the trials found, unless others are better beyond noise; None if not compared."""
        better = [comparison for comparison in self.comparisons if comparison.verdict == "better"]
        return next(iter([*better, *self.comparisons]), None)

    def contrasts(self) -> list[Contrast]:
        """Return the best boundaries found against all others, those of the paper first."""
        others = sorted(self.comparisons[1:], key=lambda other: other.label != "paper")
        return [
            Contrast(
                label=other.label,
                difference=-other.difference,
                interval=None if other.interval is None else (-other.interval[1], -other.interval[0]),
                verdict=OPPOSITE[other.verdict],
            )
            for other in others
            if other.difference is not None
        ]


def ranked(trials: Iterable[TrialRow], higher_is_better: bool) -> list[TrialRow]:
    """Return trials from best to worst: a higher rung goes first, then the score; those without a score follow, the failed are last.

    Scores of different rungs are never compared: more training alone makes a score better.
    """

    def place(trial: TrialRow) -> tuple[bool, bool, int, float, str]:
        score = 0.0 if trial.score is None or not trial.has_score else trial.score
        return trial.state == "failed", not trial.has_score, -trial.rung, -score if higher_is_better else score, trial.name

    return sorted(trials, key=place)


def conclusions(report: SearchReport) -> list[str]:
    """Return what the search came to in sentences, the verdict first; never more than the numbers carry."""
    best, metric = report.best, metric_label(report.metric)
    if best is None or best.score is None:
        failed = sum(trial.state == "failed" for trial in report.trials)
        return [f"No boundaries were found: none of {len(report.trials)} trials has a score" + (f", {failed} failed." if failed else ".")]
    told = f"{best.name} ({best.origin}) scored {score_text(best.score, best.score_error)} {metric} at {best.rung:,} steps"
    contrasts = report.contrasts()
    if not contrasts:
        return [f"The best trial was not compared with others over several seeds: {told}, which may be luck."]
    return [*(_conclusion(contrast, metric) for contrast in contrasts), *_against_start(report, metric)]


def _against_start(report: SearchReport, metric: str) -> list[str]:
    """Say how many trials are above what they started from, without which a ranking of losses would look like a success."""
    if report.start is None:
        return []
    scores = [trial.score for trial in report.trials if trial.score is not None and trial.has_score]
    above = sum(score > report.start if report.higher_is_better else score < report.start for score in scores)
    told = f"The network that all experts start from scores {report.start:.2f} {metric} by itself: {above} of {len(scores)} trials "
    told += "are better"
    return [f"{told}." if above else f"{told}, so at this much training experts do not pay yet, wherever they are split."]


def _conclusion(contrast: Contrast, metric: str) -> str:
    other = REFERENCES.get(contrast.label, f"the boundaries of {contrast.label}")
    if contrast.verdict == "not known":
        return f"The best boundaries found cannot be compared with {other}: a crop of one of them has no finite {metric}."
    amount = f"{metric} {_signed(contrast.difference, contrast)}"
    if contrast.interval is not None:
        low, high = contrast.interval
        amount += f", 95 % interval {_signed(low, contrast)} to {_signed(high, contrast)}"
    if contrast.verdict == "no difference":
        return f"No difference beyond noise between the best boundaries found and {other}: {amount}."
    return f"The best boundaries found are {contrast.verdict} than {other}: {amount}."


def _signed(value: float, contrast: Contrast) -> str:
    width = None if contrast.interval is None else (contrast.interval[1] - contrast.interval[0]) / 4
    return score_text(value, width, signed=True).split(" ")[0]


def score_text(value: float, error: float | None, *, signed: bool = False, plus_minus: str = "\u00b1") -> str:
    """Write a score with its error, both with the decimals that show two digits of the error, at least 2 and at most 6."""
    known = error is not None and isfinite(error) and error > 0
    decimals = min(6, max(2, 1 - floor(log10(error)))) if error is not None and known else 4
    written = f"{value:{'+' if signed else ''}.{decimals}f}"
    return f"{written} {plus_minus} {error:.{decimals}f}" if known else written
