"""Stage `trials`: Ray Tune over the boundaries, from the proposals on, each trial through the loop of a real run."""

import gc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from linearsr.metric_table import metric_spec
from linearsr.noise_profile import NoiseProfile
from linearsr.partition import CutGrid, Proposal, propose
from linearsr_platform import storage
from linearsr_platform.cluster.board import ProgressBoard
from linearsr_platform.cluster.boundary_search import PastTrial, boundary_search
from linearsr_platform.cluster.capacity import Share, trials_at_once
from linearsr_platform.cluster.experts import room_now
from linearsr_platform.cluster.reservations import wait_for_room
from linearsr_platform.cluster.rungs import rung_scheduler
from linearsr_platform.cluster.scoring import VERSION, Candidate, Scoring, measure_all
from linearsr_platform.cluster.sweep import SweepLost, run_sweep
from linearsr_platform.cluster.trial import SCORE, TrialPlan
from linearsr_platform.cluster.warm import ExpertStore
from linearsr_platform.errors import StageError
from linearsr_platform.json_numbers import nan_for_null, null_for_nan
from linearsr_platform.recipe.search_schema import trial_training
from linearsr_platform.report.search_model import TrialRow, ranked
from linearsr_platform.stages.activations import worker_bytes
from linearsr_platform.stages.context import RunContext, StageOutput, StageResult
from linearsr_platform.stages.jobs import knee_weights, make_job, statistics_of
from linearsr_platform.stages.ledger import Ledger
from linearsr_platform.stages.prepare import manifest_of
from linearsr_platform.stages.profile import profile_of, section_of, trial_share
from linearsr_platform.stages.sweep_log import SweepLog
from linearsr_platform.tracking.runs import TrackedRun

EXPERTS_FOLDER = "trained-experts"
"""Below a search's folder: every expert that was ever trained for it, by content."""
BASELINE_FILE = "baseline.json"
"""In the stage's folder: every metric of every crop restored by the network that all experts start from."""


def settings(context: RunContext) -> object:
    """Return what decides a trial's score; how many trials are wanted does not: more of them continue the search."""
    dump = context.recipe.model_dump(mode="json")
    left_out = ("parent", "trials", "max_concurrent", "profile", "finalists")
    search = {name: value for name, value in dump["search"].items() if name not in left_out}
    training = {"train": context.recipe.experts.train.decisive(), "overlap": dump["experts"]["overlap_log_snr"]}
    return {"search": search, **training, "sampler": dump["sampler"], "scoring": VERSION, "origin": origin_of(context)}


def origin_of(context: RunContext) -> dict[str, str]:
    """Return what tells apart the data and the network that all experts start from.

    Their stages keep key and folder when they are done again, `--from prepare` or by the parent, and may come to something else. Of the
    network it is the run that made it: its weights may be gone, or large and far away.
    """
    return {"data": manifest_of(context).digest, "pretrain": context.results["pretrain"].run_id}


def suffices(context: RunContext, found: StageResult) -> bool:
    """Tell whether an earlier search tried as many boundaries as are wanted now."""
    return int(found.data["trials"]) >= section_of(context).trials


def run(context: RunContext, url: str, tracked: TrackedRun) -> StageOutput:
    """Try boundaries until the recipe's number of trials has ended; those of an interrupted attempt count."""
    section, plan, ledger = section_of(context), trial_plan(context), Ledger(storage.join(url, "ledger"))
    proposals = proposals_of(context)
    cluster, share = context.recipe.cluster, trial_share(context)
    wait_for_room("a trial", share, cluster.queue_timeout_s)
    concurrent = trials_at_once(share, room_now(), wanted=section.max_concurrent, may_grow=cluster.address is not None)
    plan = replace(plan, baseline=_baseline(plan, share, url))
    tracked.log_params({"concurrent_trials": concurrent, "proposals": {one.name: list(one.boundaries) for one in proposals}})
    _try_all(context, plan, ledger, proposals, url=url, share=share, concurrent=concurrent)
    rows = ledger.rows(section.rungs, {})
    best = best_of(rows, higher_is_better=metric_spec(section.metric).higher_is_better)
    trained, cached = sum(row.trained for row in rows), sum(row.cached for row in rows)
    tracked.log_metrics(
        0,
        {
            "score": best.score or 0.0,
            "start": sum(plan.baseline) / len(plan.baseline),
            "trained": trained,
            "cached": cached,
            "cached_share": cached / (trained + cached),
        },
    )
    failed = sum(row.state == "failed" for row in rows)
    summary = (
        f"{len(rows)} trials, best {best.name} {section.metric} {best.score:.4g}, {cached / (trained + cached):.0%} of trainings saved"
    )
    return StageOutput(summary + (f", {failed} failed" if failed else ""), {"trials": len(ledger.ended), "best": best.name})


def _try_all(
    context: RunContext, plan: TrialPlan, ledger: Ledger, proposals: Sequence[Proposal], *, url: str, share: Share, concurrent: int
) -> None:
    """Run trials until the recipe's number of them has ended; where all were lost at once, the others go on, one less at a time.

    Raises:
        StageError: if they were lost oftener than a trial may fail, or there is no room for one any more.
    """
    losses, most = 0, context.recipe.experts.train.max_failures
    while (left := section_of(context).trials - len(ledger.ended)) > 0:
        try:
            _sweep(context, plan, ledger, proposals, url=url, share=share, concurrent=concurrent, left=left)
            break
        except SweepLost as error:
            # Those that waited for room ran nowhere.
            running = min(concurrent, max(1, room_now().workers(share)))
            losses, concurrent = losses + 1, max(1, running - 1)
            if losses > most:
                fix = "raise cluster.memory_gb_per_worker, or lower search.max_concurrent; the same command goes on"
                raise StageError(f"{error}, {losses} times; fix: {fix}") from error
            context.display.message(f"{error}; they go on from their checkpoints, at most {concurrent} at once")
        # Tune lets go of actors and reservations, but the error has kept hold of Tune.
        gc.collect()
        wait_for_room("a trial", share, context.recipe.cluster.queue_timeout_s)
    storage.remove(storage.join(url, "ray"))


def _sweep(
    context: RunContext,
    plan: TrialPlan,
    ledger: Ledger,
    proposals: Sequence[Proposal],
    *,
    url: str,
    share: Share,
    concurrent: int,
    left: int,
) -> None:
    section = section_of(context)
    mode: Literal["max", "min"] = "max" if metric_spec(section.metric).higher_is_better else "min"
    log = SweepLog(context, ledger, plan, proposals, concurrent)
    log.show()
    board = ProgressBoard.start()
    try:
        run_sweep(
            plan,
            searcher=boundary_search(
                plan.grid, section.experts, proposals, metric=SCORE, mode=mode, seed=section.seed, history=_history(ledger)
            ),
            scheduler=rung_scheduler(section.rungs, metric=SCORE, mode=mode, reduction=section.reduction, history=_rung_scores(ledger)),
            trials=left,
            concurrent=concurrent,
            share=share,
            max_failures=context.recipe.experts.train.max_failures,
            storage_url=storage.join(url, "ray"),
            board=board,
            observer=log,
            grow=context.recipe.cluster.address is not None and section.max_concurrent is not None,
        )
    finally:
        log.close()
        board.close()


def _baseline(plan: TrialPlan, share: Share, url: str) -> tuple[float, ...]:
    """Return what the pre-trained network alone makes of every crop, measured once."""
    file = storage.join(url, BASELINE_FILE)
    if not storage.exists(file):
        weights = plan.store.template.init_weights
        assert weights is not None  # noqa: S101 (experts start from the pre-trained network)
        (measured,) = measure_all(plan.scoring, [Candidate(boundaries=(), weights=(weights,))], share)
        storage.write_json(file, null_for_nan(measured))
    return _baseline_scores(url, plan.metric)


def start_of(context: RunContext) -> float:
    """Return what the network that all experts start from scored in the finished stage."""
    values = _baseline_scores(context.results["trials"].url, section_of(context).metric)
    return sum(values) / len(values)


def _baseline_scores(url: str, metric: str) -> tuple[float, ...]:
    found: Any = storage.read_json(storage.join(url, BASELINE_FILE))
    return tuple(nan_for_null(value) for value in found[metric])


def best_of(rows: list[TrialRow], *, higher_is_better: bool) -> TrialRow:
    """Return the best trial.

    Raises:
        StageError: if none has a score; with the first reason.
    """
    best = next((row for row in ranked(rows, higher_is_better) if row.has_score), None)
    if best is None:
        reason = next((row.reason for row in rows if row.reason), "there are none")
        raise StageError(
            f"search: all {len(rows)} trials failed: {reason}; fix the cause and run the same command again with --from trials"
        )
    return best


def ledger_of(context: RunContext) -> Ledger:
    """Return the ledger of the finished stage."""
    return Ledger(storage.join(context.results["trials"].url, "ledger"))


def proposals_of(context: RunContext) -> list[Proposal]:
    """Return the boundaries to begin with, for each number of experts that is allowed."""
    profile: NoiseProfile = profile_of(context)
    counts = section_of(context).experts
    return [proposal for count in counts for proposal in propose(count, profile=profile, grid=grid_of(context))]


def grid_of(context: RunContext) -> CutGrid:
    """Return where boundaries may lie."""
    section = section_of(context)
    low, high = section.log_snr
    return CutGrid(low=low, high=high, step=section.step_log_snr, min_width=section.min_width_log_snr)


def trial_plan(context: RunContext) -> TrialPlan:
    """Describe what all trials have in common."""
    recipe, section = context.recipe, section_of(context)
    training = trial_training(recipe.experts.train)
    template = make_job(
        context,
        name="expert",
        url=context.run_url,
        train=training,
        interval=(0.0, 1.0),
        statistics=statistics_of(context),
        init_weights=knee_weights(context.results["pretrain"].data["trainers"], "pretrain"),
        memory_bytes=worker_bytes(recipe, training),
    )
    validation = recipe.validation.model_copy(update={"crops": min(recipe.validation.crops, recipe.validation.batch_size)})
    sampler = replace(recipe.sampler, num_steps=section.score.steps, times=None)
    task: Any = template.task_config
    return TrialPlan(
        store=ExpertStore(
            template=replace(template, validation=validation),
            url=storage.join(context.run_url, EXPERTS_FOLDER),
            origin=origin_of(context),
        ),
        scoring=Scoring(
            task=task,
            sampler=sampler,
            section=section.score,
            shards=template.validation_shards,
            compiled_kernels=template.compiled_kernels,
        ),
        grid=grid_of(context),
        overlap_log_snr=recipe.experts.overlap_log_snr,
        rungs=section.rungs,
        metric=section.metric,
        seed=section.seed,
        threads=max(1, int(recipe.cluster.cpus_per_worker)),
    )


def _history(ledger: Ledger) -> list[PastTrial]:
    return [
        PastTrial(config=record.config, scores=tuple(result.score for result in record.results), ended=record.ended)
        for record in ledger.records.values()
    ]


def _rung_scores(ledger: Ledger) -> dict[str, dict[int, float]]:
    return {record.name: {result.steps: result.score for result in record.results} for record in ledger.ended}
