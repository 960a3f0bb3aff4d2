"""Stage `experts`: one network per interval of noise levels, in parallel, each from pretrain's knee."""

from linearsr.experts import bisect_boundaries, training_interval
from linearsr_platform.stages.context import RunContext, StageOutput
from linearsr_platform.stages.jobs import as_data, describe, knee_weights, make_job, run_jobs, statistics_of
from linearsr_platform.tracking.runs import TrackedRun


def boundaries_of(context: RunContext) -> tuple[float, ...]:
    """Return the recipe's boundaries, ascending noise levels."""
    section = context.recipe.experts
    return bisect_boundaries(section.anchor) if section.boundaries == "bisection" else section.boundaries


def expert_names(context: RunContext) -> list[str]:
    """Return `expert-1`, `expert-2`, ...; the first is the noisiest."""
    return [f"expert-{index + 1}" for index in range(len(boundaries_of(context)) + 1)]


def settings(context: RunContext) -> object:
    """Return the experts' section; the parent network is a need."""
    return context.recipe.experts.model_dump(mode="json", exclude={"cpus_per_worker"})


def run(context: RunContext, url: str, tracked: TrackedRun) -> StageOutput:
    """Train all experts."""
    section, boundaries = context.recipe.experts, boundaries_of(context)
    parent = knee_weights(context.results["pretrain"].data["trainers"], "pretrain")
    jobs = [
        make_job(
            context,
            name=name,
            url=url,
            train=section.train,
            interval=training_interval(index, boundaries, section.overlap_log_snr),
            statistics=statistics_of(context),
            init_weights=parent,
        )
        for index, name in enumerate(expert_names(context))
    ]
    outcomes = run_jobs(context, jobs, url, tracked, cpus_per_worker=section.cpus_per_worker)
    return StageOutput(describe(outcomes), {"trainers": as_data(outcomes), "boundaries": list(boundaries)})
