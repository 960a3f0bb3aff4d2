"""Stage `experts`: one network per interval of noise levels, in parallel, each from pretrain's knee."""

from collections.abc import Mapping
from typing import Literal

from linearsr.experts import training_interval
from linearsr_platform.recipe.train_schema import TrainConfig
from linearsr_platform.stages.activations import worker_bytes
from linearsr_platform.stages.context import RunContext, StageOutput
from linearsr_platform.stages.jobs import as_data, describe, knee_weights, make_job, run_jobs, statistics_of
from linearsr_platform.tracking.runs import TrackedRun
from linearsr_platform.train.job import TrainJob


def boundaries_of(context: RunContext) -> tuple[float, ...]:
    """Return the recipe's boundaries, ascending noise levels."""
    return context.recipe.experts.resolved_boundaries


def expert_names(context: RunContext) -> list[str]:
    """Return `expert-1`, `expert-2`, ...; the first is the noisiest."""
    return [f"expert-{index + 1}" for index in range(len(boundaries_of(context)) + 1)]


def settings(context: RunContext) -> object:
    """Return the experts' section; the parent network is a need."""
    section = context.recipe.experts
    return {**section.model_dump(mode="json", exclude={"cpus_per_worker"}), "train": section.train.decisive()}


def run(context: RunContext, url: str, tracked: TrackedRun) -> StageOutput:
    """Train all experts."""
    section = context.recipe.experts
    parent = knee_weights(context.results["pretrain"].data["trainers"], "pretrain")
    jobs = expert_jobs(context, url, section.train, parents=dict.fromkeys(expert_names(context), parent))
    outcomes = run_jobs(context, jobs, url, tracked, cpus_per_worker=section.cpus_per_worker)
    return StageOutput(describe(outcomes), {"trainers": as_data(outcomes), "boundaries": list(boundaries_of(context))})


def expert_jobs(
    context: RunContext, url: str, train: TrainConfig, *, parents: Mapping[str, str], split: Literal["train", "high-quality"] = "train"
) -> list[TrainJob]:
    """Describe one trainer for each expert: on its interval and the overlap, from its parent's weights, on a split."""
    boundaries, overlap = boundaries_of(context), context.recipe.experts.overlap_log_snr
    memory_bytes = worker_bytes(context.recipe, train)
    return [
        make_job(
            context,
            name=name,
            url=url,
            train=train,
            interval=training_interval(index, boundaries, overlap),
            statistics=statistics_of(context),
            split=split,
            init_weights=parents[name],
            memory_bytes=memory_bytes,
        )
        for index, name in enumerate(expert_names(context))
    ]
