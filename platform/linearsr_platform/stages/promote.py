"""Stage `promote`: the challenger becomes champion, or is refused by the rules that did not hold."""

from dataclasses import asdict

from linearsr_platform.registry.models import CHAMPION, aliases_of
from linearsr_platform.registry.promotion import PromotionDecision, promote
from linearsr_platform.stages.context import RunContext, StageOutput, StageResult
from linearsr_platform.tracking.runs import TrackedRun


def settings(context: RunContext) -> object:
    """Return the rules."""
    return context.recipe.gate.model_dump(mode="json")


def suffices(context: RunContext, found: StageResult) -> bool:
    """Tell whether the decision is about the version that is registered, and has left the champion that there is now."""
    decision = found.data["decision"]
    left = decision["challenger_version"] if decision["promoted"] else decision["champion_version"]
    return bool(decision["challenger_version"] == _version(context) and left == _champion(context))


def run(context: RunContext, url: str, tracked: TrackedRun) -> StageOutput:
    """Decide and, if every rule holds, move the alias. A refusal is a result, not a failure: the champion stays."""
    name, version = context.recipe.model_name, _version(context)
    decision = _replaced(context, StageResult.read(url))
    if decision is None:
        decision = promote(context.tracker.client, name, section=context.recipe.gate, by=context.user, version=version)
    tracked.set_tags({"promoted": decision.promoted, "reason": decision.reason})
    told = {"promoted": decision.promoted, **asdict(decision)}
    tracked.log_dict(told, "promotion.json")
    verdict = f"models:/{name}@champion is version {decision.challenger_version}" if decision.promoted else decision.state
    return StageOutput(f"{verdict}: {decision.reason}", {"decision": told})


def _replaced(context: RunContext, earlier: StageResult | None) -> PromotionDecision | None:
    """Return that another version is the champion now, if an earlier attempt has made this one so: a rollback, or a better one, stands."""
    version, champion = _version(context), _champion(context)
    before = None if earlier is None else earlier.data["decision"]
    # Without any champion, as in a new registry, there is nothing that could stand.
    if before is None or before["challenger_version"] != version or champion in (version, None):
        return None
    if not before["promoted"] and before["state"] != "replaced":
        return None
    again = f"`linearsr models promote {context.recipe.model_name}/{version}` asks again"
    return PromotionDecision(
        state="replaced",
        reason=f"version {version} was the champion, and version {champion} is now; {again}",
        challenger_version=version,
        champion_version=champion,
    )


def _version(context: RunContext) -> int:
    return int(context.results["register"].data["version"])


def _champion(context: RunContext) -> int | None:
    return aliases_of(context.tracker.client, context.recipe.model_name).get(CHAMPION)
