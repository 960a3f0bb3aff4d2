"""Stage `register`: the bundle becomes a version of a registered model, alias `challenger`."""

from linearsr_platform import storage
from linearsr_platform.registry.models import Evaluation
from linearsr_platform.registry.register import register
from linearsr_platform.stages.assemble import bundle_url
from linearsr_platform.stages.context import RunContext, StageOutput
from linearsr_platform.tracking.runs import TrackedRun


def settings(context: RunContext) -> object:
    """Return where it is registered and under which name."""
    return {"name": context.recipe.model_name, "uri": context.tracker.uri}


def run(context: RunContext, url: str, tracked: TrackedRun) -> StageOutput:
    """Register the bundle with its evaluation and lineage."""
    name = context.recipe.model_name
    data = context.results["evaluate"].data
    evaluation = Evaluation(protocol=data["protocol"], test_set=data["test_set"], rows=data["rows"])
    with storage.local_path(bundle_url(context)) as folder:
        version = register(
            context.tracker.client,
            folder,
            name=name,
            evaluation=evaluation,
            run_id=tracked.run_id,
        )
    return StageOutput(f"{name} version {version}, alias challenger", {"name": name, "version": version})
