"""Stage `register`: the bundle becomes a version of a registered model, alias `challenger`."""

from linearsr_platform import storage
from linearsr_platform.errors import UserError
from linearsr_platform.registry.evaluation import Evaluation
from linearsr_platform.registry.models import CHALLENGER, aliases_of, find_version
from linearsr_platform.registry.register import register
from linearsr_platform.stages.assemble import bundle_url
from linearsr_platform.stages.context import RunContext, StageOutput, StageResult
from linearsr_platform.tracking.runs import TrackedRun


def settings(context: RunContext) -> object:
    """Return where it is registered, under which name, and the gate it is meant for."""
    gate = context.recipe.gate.model_dump(mode="json")
    return {"name": context.recipe.model_name, "uri": context.tracker.uri, "gate": gate}


def suffices(context: RunContext, found: StageResult) -> bool:
    """Tell whether the version is still there: others write to the registry too."""
    try:
        find_version(context.tracker.client, found.data["name"], int(found.data["version"]))
    except UserError:
        return False
    return True


def remark(context: RunContext, found: StageResult) -> str:
    """Say which version is the challenger, if that is another one by now: who registered it later wants it to stay."""
    challenger = aliases_of(context.tracker.client, found.data["name"]).get(CHALLENGER)
    if challenger == int(found.data["version"]):
        return ""
    return f"alias {CHALLENGER} is {'no version' if challenger is None else f'version {challenger}'}'s by now"


def run(context: RunContext, url: str, tracked: TrackedRun) -> StageOutput:
    """Register the bundle with its evaluation and lineage."""
    name = context.recipe.model_name
    with storage.local_path(bundle_url(context)) as folder:
        version = register(
            context.tracker.client,
            folder,
            name=name,
            evaluation=Evaluation.from_plain(context.results["evaluate"].data["tables"]),
            run_id=tracked.run_id,
            rules=context.recipe.gate,
        )
    return StageOutput(f"{name} version {version}, alias challenger", {"name": name, "version": version})
