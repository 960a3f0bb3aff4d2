"""Stage `finalists`: the best boundaries and those they must beat, trained anew with several seeds through the trainers of a real run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from linearsr.experts import bisect_boundaries
from linearsr.metric_table import metric_spec
from linearsr.partition import uniform_time
from linearsr_platform import storage
from linearsr_platform.cluster.board import Event, ProgressBoard
from linearsr_platform.cluster.experts import TrainerFailure, fit_all
from linearsr_platform.cluster.record import finished_outcome
from linearsr_platform.cluster.reservations import wait_for_room
from linearsr_platform.cluster.scoring import Candidate, measure_all
from linearsr_platform.cluster.trial import TrialPlan
from linearsr_platform.errors import StageError
from linearsr_platform.json_numbers import nan_for_null, null_for_nan
from linearsr_platform.report.comparison import paired_comparison
from linearsr_platform.report.search_model import OPPOSITE, Comparison, Verdict, ranked
from linearsr_platform.stages.context import RunContext, StageOutput
from linearsr_platform.stages.profile import section_of, trial_share
from linearsr_platform.stages.trials import ledger_of, trial_plan
from linearsr_platform.tracking.runs import TrackedRun
from linearsr_platform.train.job import TrainJob

PAPER, SINGLE = "paper", "single expert"
CONFIDENCE = 0.95
"""Of all intervals together (Bonferroni)."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Boundaries in the final."""

    label: str
    boundaries: tuple[float, ...]


def settings(context: RunContext) -> object:
    """Return who is in the final, with which seeds, and everything that decides the scores."""
    section = section_of(context)
    contenders = [asdict(one) for one in contenders_of(context)]
    return {"contenders": contenders, "finalists": section.finalists.model_dump(mode="json"), "metric": section.metric}


def run(context: RunContext, url: str, tracked: TrackedRun) -> StageOutput:
    """Train, score and compare; every difference is paired by seed and crop, and comes with an interval."""
    section, plan = section_of(context), trial_plan(context)
    contenders = contenders_of(context)
    # None of the search's own: its winner was chosen by that one's luck too.
    seeds = [section.seed + 1 + index for index in range(section.finalists.seeds)]
    teams = {(one.label, seed): plan.jobs(one.boundaries, section.rungs[-1], seed=seed) for one in contenders for seed in seeds}
    weights = _train(context, plan, {job.name: job for team in teams.values() for job in team}, url)
    candidates = [
        Candidate(boundaries=one.boundaries, weights=tuple(weights[job.name] for job in teams[one.label, seed]))
        for one in contenders
        for seed in seeds
    ]
    share = trial_share(context)
    # Trainers may have needed less, and those that were done before needed nothing.
    wait_for_room("finalists", share, context.recipe.cluster.queue_timeout_s)
    measured = measure_all(plan.scoring, candidates, share)
    scores = np.array([values[section.metric] for values in measured]).reshape(len(contenders), len(seeds), -1)
    comparisons = compare(contenders, scores, higher_is_better=metric_spec(section.metric).higher_is_better)
    for one in comparisons:
        tracked.log_metrics(0, {f"{one.label}/score": one.score, f"{one.label}/error": one.score_error})
    means = {
        one.label: {
            name: float(np.mean([values[name] for values in measured[i * len(seeds) : (i + 1) * len(seeds)]])) for name in measured[0]
        }
        for i, one in enumerate(contenders)
    }
    data = data_of(comparisons, seeds=seeds, means=means)
    tracked.log_dict(data, "comparisons.json")
    summary = f"{section.metric} {comparisons[0].score:.4g}, {_against(comparisons)}"
    return StageOutput(summary, data)


def contenders_of(context: RunContext) -> list[Contender]:
    """Return the best trials of the last rung, then the paper's boundaries, uniform ones and a single expert, each once."""
    section = section_of(context)
    rows = ranked(ledger_of(context).rows(section.rungs, {}), metric_spec(section.metric).higher_is_better)
    # A small space is soon tried out, and a trial of known boundaries has the score of the first.
    first = {row.boundaries: row for row in reversed(rows) if row.has_score}
    best = [row for row in rows if row is first.get(row.boundaries)][: section.finalists.top]
    experts = len(best[0].boundaries) + 1
    found = [Contender(label="best found" if index == 0 else row.name, boundaries=row.boundaries) for index, row in enumerate(best)]
    references = [
        Contender(label=PAPER, boundaries=bisect_boundaries(context.recipe.experts.anchor)),
        Contender(label="uniform in t", boundaries=uniform_time(experts)),
        Contender(label=SINGLE, boundaries=()),
    ]
    known = {one.boundaries for one in found}
    return [*found, *(one for one in references if one.boundaries not in known)]


def compare(contenders: Sequence[Contender], scores: NDArray[np.float64], *, higher_is_better: bool) -> list[Comparison]:
    """Compare every contender with the first, which the trials found best before any of these scores was known.

    Args:
        contenders: at least two.
        scores: (contenders, seeds, crops).
        higher_is_better: of the metric.

    Returns:
        The first, then the others in order of their mean score; of which a crop has none that is finite are last.
    """
    comparisons: list[Comparison] = []
    for one, own_scores in zip(contenders, scores, strict=True):
        own = paired_comparison(own_scores, confidence=CONFIDENCE)
        common: dict[str, Any] = {"label": one.label, "boundaries": one.boundaries, "seeds": scores.shape[1]}
        common |= {"score": own.mean, "score_error": own.error}
        if not comparisons:
            comparisons.append(Comparison(**common, difference=None, interval=None, verdict="reference"))
            continue
        found = paired_comparison(own_scores - scores[0], confidence=1 - (1 - CONFIDENCE) / (len(contenders) - 1))
        verdict = _verdict(found.interval, higher_is_better)
        comparisons.append(Comparison(**common, difference=found.mean, interval=found.interval, verdict=verdict))
    sign = -1 if higher_is_better else 1
    return [comparisons[0], *sorted(comparisons[1:], key=lambda one: (not isfinite(one.score), sign * one.score))]


def data_of(comparisons: Sequence[Comparison], *, seeds: Sequence[int], means: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return the finished stage's data as JSON; null stands for a number that is not finite."""
    data: dict[str, Any] = null_for_nan({"comparisons": [asdict(one) for one in comparisons], "seeds": list(seeds), "metrics": dict(means)})
    return data


def comparisons_of(data: Mapping[str, Any]) -> tuple[Comparison, ...]:
    """Read the comparisons back from the finished stage's data."""
    return tuple(_comparison_of(one) for one in data["comparisons"])


def _comparison_of(value: Mapping[str, Any]) -> Comparison:
    is_reference = value["verdict"] == "reference"
    numbers = {name: nan_for_null(value[name]) for name in ("score", "score_error")}
    return Comparison(
        label=value["label"],
        boundaries=tuple(value["boundaries"]),
        seeds=value["seeds"],
        **numbers,
        difference=None if is_reference else nan_for_null(value["difference"]),
        interval=None if is_reference else (nan_for_null(value["interval"][0]), nan_for_null(value["interval"][1])),
        verdict=value["verdict"],
    )


def _verdict(interval: tuple[float, float], higher_is_better: bool) -> Verdict:
    low, high = interval if higher_is_better else (-interval[1], -interval[0])
    if not (isfinite(low) and isfinite(high)):
        return "not known"
    return "better" if low > 0 else "worse" if high < 0 else "no difference"


def _against(comparisons: Sequence[Comparison]) -> str:
    paper = next((one for one in comparisons if one.label == PAPER), None)
    if paper is None or paper.difference is None or paper.interval is None:
        return "the paper's boundaries"
    low, high = -paper.interval[1], -paper.interval[0]
    return f"{-paper.difference:+.3g} [{low:+.3g}, {high:+.3g}] against the paper's: {OPPOSITE[paper.verdict]}"


def _train(context: RunContext, plan: TrialPlan, jobs: Mapping[str, TrainJob], url: str) -> dict[str, str]:
    """Train every job through Ray Train and return each one's weights.

    Raises:
        StageError: naming the first failure; what is trained stays.
    """
    context.open_cluster()
    context.display.task("finalists", len(jobs), "experts trained")
    board, ended = ProgressBoard.start(), sum(finished_outcome(job) is not None for job in jobs.values())
    context.display.update("finalists", ended)

    def on_poll(events: list[Event]) -> None:
        nonlocal ended
        ended += sum(event.kind == "end" for event in events)
        context.display.update("finalists", ended)

    try:
        results = fit_all(
            list(jobs.values()),
            context.recipe.cluster,
            storage_url=storage.join(url, "ray"),
            board=board,
            on_poll=on_poll,
            cpus_per_worker=context.recipe.experts.cpus_per_worker,
        )
    finally:
        board.close()
    failed = [result for result in results.values() if isinstance(result, TrainerFailure)]
    if failed:
        error = StageError(f"finalists: {len(failed)} of {len(jobs)} trainers failed: {failed[0].message}; fix the cause and run it again")
        error.add_note(failed[0].details)
        raise error
    return {name: result.last_weights for name, result in results.items() if not isinstance(result, TrainerFailure)}
