"""Stage `assemble`: the experts' knees, boundaries and sampler become one bundle."""

from contextlib import ExitStack

from linearsr.bundle import save_bundle
from linearsr_platform import storage
from linearsr_platform.scratch import scratch_folder
from linearsr_platform.stages.code_version import code_version
from linearsr_platform.stages.context import RunContext, StageOutput
from linearsr_platform.stages.experts import boundaries_of, expert_names
from linearsr_platform.stages.jobs import knee_weights, model_config, statistics_of
from linearsr_platform.stages.prepare import manifest_of
from linearsr_platform.tracking.runs import TrackedRun

BUNDLE = "bundle"


def settings(context: RunContext) -> object:
    """Return the sampler, which a bundle carries."""
    return context.recipe.model_dump(mode="json")["sampler"]


def run(context: RunContext, url: str, tracked: TrackedRun) -> StageOutput:
    """Write the bundle below `url`."""
    trainers = context.results["finetune"].data["trainers"]
    names = expert_names(context)
    lineage = {
        "code": code_version(),
        "experts": [expert_lineage(context, name) for name in names],
        "recipe": context.recipe.name,
        "recipe_hash": context.loaded.hash,
        "manifest_digest": manifest_of(context).digest,
        "protocols": list(context.recipe.evaluate.protocols),
        "stages": {name: result.key for name, result in context.results.items()},
        "knee_steps": {
            stage: {name: outcome["knee_step"] for name, outcome in context.results[stage].data["trainers"].items()}
            for stage in ("pretrain", "experts", "finetune")
        },
    }
    with ExitStack() as stack:
        weights = [stack.enter_context(storage.local_path(knee_weights(trainers, name))) for name in names]
        folder = stack.enter_context(scratch_folder()) / BUNDLE
        bundle = save_bundle(
            folder,
            config=model_config(context),
            statistics=statistics_of(context),
            boundaries=boundaries_of(context),
            sampler=context.recipe.sampler,
            expert_weights=weights,
            lineage=lineage,
            precision=context.recipe.finetune.train.precision,
            text=manifest_of(context).text,
        )
        storage.copy_tree(str(folder), bundle_url_in(url))
    tracked.set_tags({"bundle_digest": bundle.digest})
    return StageOutput(f"{len(names)} experts, digest {bundle.digest[:12]}", {"digest": bundle.digest})


def expert_lineage(context: RunContext, name: str) -> dict[str, object]:
    """Return what an expert came from: the weights that each stage handed on, from the first, and the knee in each."""
    weights, knees = {}, {}
    for stage, trainer in (("pretrain", "pretrain"), ("experts", name), ("finetune", name)):
        outcome = context.results[stage].data["trainers"][trainer]
        # Relative, so that the same training has the same identity under another storage root.
        weights[stage] = str(outcome["knee_weights"]).removeprefix(context.run_url).lstrip("/")
        knees[stage] = {"step": outcome["knee_step"], "confirmed": outcome["decision"]["confirmed_at"] is not None}
    return {"name": name, "weights": weights, "knees": knees}


def bundle_url(context: RunContext) -> str:
    """Return the folder of the assembled bundle."""
    return bundle_url_in(context.results["assemble"].url)


def bundle_url_in(stage_url: str) -> str:
    """Return where `assemble` puts the bundle inside its folder."""
    return storage.join(stage_url, BUNDLE)
