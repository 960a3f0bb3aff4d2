"""Stage `profile`: what the gradients of the pre-trained network say about the noise axis."""

from typing import Any

from linearsr.noise_profile import NoiseProfile
from linearsr_platform import storage
from linearsr_platform.cluster.capacity import Share, share_of_worker
from linearsr_platform.cluster.experts import room_now
from linearsr_platform.cluster.profiling import ProfilePlan, profile_on_cluster
from linearsr_platform.cluster.reservations import wait_for_room
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.search_schema import SearchSection, trial_training
from linearsr_platform.stages.activations import worker_bytes
from linearsr_platform.stages.context import RunContext, StageOutput
from linearsr_platform.stages.jobs import knee_weights, make_job, statistics_of
from linearsr_platform.tracking.runs import TrackedRun

PROFILE_FILE = "profile.json"


def section_of(context: RunContext) -> SearchSection:
    """Return the recipe's search.

    Raises:
        UserError: if it has none.
    """
    if context.recipe.search is None:
        raise UserError("search: got a recipe without this section; expected one; fix: see pipelines/search_boundaries.yaml")
    return context.recipe.search


def trial_share(context: RunContext) -> Share:
    """Return what profiling, each trial and scoring reserve: a worker's share, for a trial's experts train one after the other.

    No more memory than a machine of the cluster has, which this opens: whoever reserved more would wait for ever.
    """
    recipe = context.recipe
    context.open_cluster()
    (memory_bytes,) = worker_bytes(recipe, trial_training(recipe.experts.train)).values()
    return room_now().attainable(share_of_worker(recipe.cluster, memory_bytes=memory_bytes), 1)


def settings(context: RunContext) -> object:
    """Return what the profile depends on beside the network: levels, draws, and the crops that experts train on."""
    section = section_of(context)
    crop_px = context.recipe.experts.train.crop_px
    return {"profile": section.profile.model_dump(mode="json"), "log_snr": section.log_snr, "seed": section.seed, "crop_px": crop_px}


def run(context: RunContext, url: str, tracked: TrackedRun) -> StageOutput:
    """Measure the profile and keep it as `profile.json` below `url`."""
    section = section_of(context)
    job = make_job(
        context,
        name="profile",
        url=url,
        train=context.recipe.experts.train,
        interval=(0.0, 1.0),
        statistics=statistics_of(context),
        init_weights=knee_weights(context.results["pretrain"].data["trainers"], "pretrain"),
    )
    task: Any = job.task_config
    share = trial_share(context)
    plan = ProfilePlan(job=job, task=task, section=section.profile, log_snr=section.log_snr, threads=max(1, int(share.cpus)))
    context.display.task("profile", section.profile.levels, "levels")
    wait_for_room("profile", share, context.recipe.cluster.queue_timeout_s)
    profile = profile_on_cluster(plan, share, lambda done, total: context.display.update("profile", done, total))
    storage.write_json(storage.join(url, PROFILE_FILE), profile.to_json())
    tracked.log_dict(profile.to_json(), PROFILE_FILE)
    return StageOutput(f"{len(profile.mass)} levels x {profile.samples} gradients", {})


def profile_url(context: RunContext) -> str:
    """Return where the profile of the finished stage is."""
    return storage.join(context.results["profile"].url, PROFILE_FILE)


def profile_of(context: RunContext) -> NoiseProfile:
    """Return the profile of the finished stage."""
    return NoiseProfile.from_json(storage.read_json(profile_url(context)))
