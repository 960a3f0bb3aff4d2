"""Checks of a recipe on the machines that it is to run on; they leave nothing behind, and no run of it is touched."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from uuid import uuid4

from linearsr_platform import storage
from linearsr_platform.cluster.board import Event
from linearsr_platform.cluster.capacity import require_room, share_of_worker
from linearsr_platform.cluster.experts import room_now
from linearsr_platform.data.manifest import verify_shards
from linearsr_platform.stages import prepare
from linearsr_platform.stages.context import RecipeContext, StageResult
from linearsr_platform.stages.jobs import show_event
from linearsr_platform.stages.pipeline import key_of, stage_url
from linearsr_platform.stages.preflight import check_before_training
from linearsr_platform.stages.prepare import manifest_of
from linearsr_platform.stages.pretrain import measure, pretrain_job
from linearsr_platform.stages.resume_check import ResumeCheck, check_resume, choose_kill, refuse_steps

FOLDER = "doctor-"
"""Beginning of the name of the folder, under the storage root, that a check writes to and removes."""


def check_recipe_resume(context: RecipeContext, *, steps: int, other_workers: int | None, chance: Random) -> ResumeCheck:
    """Find out, with a recipe's own first training and a few steps, whether its interrupted runs end with the same bits.

    Takes the data that a run of the recipe has prepared, or prepares them for itself. Everything that it writes is under one folder of
    the storage root, which all machines see, and is removed at the end.

    Args:
        context: the recipe; its results may be empty.
        steps: of each training.
        other_workers: also go on with this number of workers; None leaves that out.
        chance: decides which worker is killed, and when.

    Raises:
        UserError: if the recipe cannot be trained: no room on the cluster, too few photographs, weights that are missing.
        StageError: if a training failed.
    """
    recipe = context.recipe
    refuse_steps(steps)
    if other_workers is not None:
        recipe.pretrain.on_workers(other_workers)
    check_before_training(recipe)
    context.open_cluster()
    if recipe.cluster.address is None:
        # Of the memory it is as in training: it is no reason not to try.
        share = replace(share_of_worker(recipe.cluster), memory_bytes=0.0)
        require_room({"pretrain": max(recipe.pretrain.workers, other_workers or 0)}, share, room_now())
    url = storage.join(context.storage_url, f"{FOLDER}{uuid4().hex[:12]}")
    try:
        context.results["prepare"] = prepared_data(context, url)
        job = pretrain_job(context, url, measure(context))

        def on_poll(events: Sequence[Event]) -> None:
            for event in events:
                show_event(context, event, job.train.model_copy(update={"max_steps": steps}))

        kill = choose_kill(recipe.pretrain.workers, steps, chance)
        return check_resume(job, recipe.cluster, url=url, steps=steps, kill=kill, other_workers=other_workers, on_poll=on_poll)
    finally:
        storage.remove(url)


def prepared_data(context: RecipeContext, url: str) -> StageResult:
    """Return the prepared data of the recipe's run, checked, or else prepare them below `url`."""
    key = key_of(prepare.NAME, prepare.settings(context), {})
    found = StageResult.read(stage_url(context.run_url, prepare.NAME, key))
    if found is not None:
        context.results[prepare.NAME] = found
        verify_shards(manifest_of(context), found.url)
        return found
    folder = storage.join(url, prepare.NAME)
    prepare.write_data(context, folder)
    return StageResult(stage=prepare.NAME, key=key, url=folder, summary="", seconds=0.0, run_id="", data={})
