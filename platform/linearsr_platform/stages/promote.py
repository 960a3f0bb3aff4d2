"""Stage `promote`: the challenger becomes champion, or is refused with the number that decided."""

from dataclasses import asdict

from linearsr_platform.registry.promotion import promote
from linearsr_platform.stages.context import RunContext, StageOutput
from linearsr_platform.tracking.runs import TrackedRun


def settings(context: RunContext) -> object:
    """Return the rule."""
    return context.recipe.promote.model_dump(mode="json")


def run(context: RunContext, url: str, tracked: TrackedRun) -> StageOutput:
    """Decide and, if the rule holds, move the alias. A refusal is a result, not a failure: the champion stays."""
    name = context.recipe.model_name
    decision = promote(context.tracker.client, name, rule=context.recipe.promote, by=context.user)
    tracked.set_tags({"promoted": decision.promoted, "reason": decision.reason})
    verdict = f"models:/{name}@champion is version {decision.challenger_version}" if decision.promoted else "refused"
    return StageOutput(f"{verdict}: {decision.reason}", {"decision": asdict(decision)})
