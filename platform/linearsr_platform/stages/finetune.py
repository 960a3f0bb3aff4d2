"""Stage `finetune`: each expert on the high-quality subset, from its own knee."""

from linearsr_platform.stages.context import RunContext, StageOutput
from linearsr_platform.stages.experts import expert_jobs, expert_names
from linearsr_platform.stages.jobs import as_data, describe, knee_weights, run_jobs
from linearsr_platform.tracking.runs import TrackedRun


def settings(context: RunContext) -> object:
    """Return the fine-tuning section; the experts are a need."""
    section = context.recipe.finetune
    return {**section.model_dump(mode="json"), "train": section.train.decisive()}


def run(context: RunContext, url: str, tracked: TrackedRun) -> StageOutput:
    """Fine-tune all experts."""
    section, before = context.recipe.finetune, context.results["experts"].data["trainers"]
    parents = {name: knee_weights(before, name) for name in expert_names(context)}
    jobs = expert_jobs(context, url, section.train, parents=parents, split=section.subset)
    outcomes = run_jobs(context, jobs, url, tracked, cpus_per_worker=context.recipe.experts.cpus_per_worker)
    return StageOutput(describe(outcomes), {"trainers": as_data(outcomes)})
