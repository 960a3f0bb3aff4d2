"""Stage `promote`: the challenger becomes champion, or is refused by the rules that did not hold."""

from dataclasses import asdict

from linearsr_platform.registry.promotion import promote
from linearsr_platform.stages.context import RunContext, StageOutput
from linearsr_platform.tracking.runs import TrackedRun


def settings(context: RunContext) -> object:
    """Return the rules."""
    return context.recipe.gate.model_dump(mode="json")


def run(context: RunContext, url: str, tracked: TrackedRun) -> StageOutput:
    """Decide and, if every rule holds, move the alias. A refusal is a result, not a failure: the champion stays."""
    name = context.recipe.model_name
    version = int(context.results["register"].data["version"])
    decision = promote(context.tracker.client, name, section=context.recipe.gate, by=context.user, version=version)
    tracked.set_tags({"promoted": decision.promoted, "reason": decision.reason})
    told = {"promoted": decision.promoted, **asdict(decision)}
    tracked.log_dict(told, "promotion.json")
    verdict = f"models:/{name}@champion is version {decision.challenger_version}" if decision.promoted else decision.state
    return StageOutput(f"{verdict}: {decision.reason}", {"decision": told})
