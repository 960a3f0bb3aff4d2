"""Stage `finetune`: each expert on the high-quality subset, from its own knee."""

from linearsr.experts import training_interval
from linearsr_platform.stages.context import RunContext, StageOutput
from linearsr_platform.stages.experts import boundaries_of, expert_names
from linearsr_platform.stages.jobs import as_data, describe, knee_weights, make_job, run_jobs, statistics_of
from linearsr_platform.tracking.runs import TrackedRun


def settings(context: RunContext) -> object:
    """Return the fine-tuning section; the experts are a need."""
    return context.recipe.finetune.model_dump(mode="json")


def run(context: RunContext, url: str, tracked: TrackedRun) -> StageOutput:
    """Fine-tune all experts."""
    section, boundaries = context.recipe.finetune, boundaries_of(context)
    parents = context.results["experts"].data["trainers"]
    jobs = [
        make_job(
            context,
            name=name,
            url=url,
            train=section.train,
            interval=training_interval(index, boundaries, context.recipe.experts.overlap_log_snr),
            statistics=statistics_of(context),
            split=section.subset,
            init_weights=knee_weights(parents, name),
        )
        for index, name in enumerate(expert_names(context))
    ]
    outcomes = run_jobs(context, jobs, url, tracked, cpus_per_worker=context.recipe.experts.cpus_per_worker)
    return StageOutput(describe(outcomes), {"trainers": as_data(outcomes)})
