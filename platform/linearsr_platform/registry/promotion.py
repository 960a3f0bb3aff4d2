"""The gate between `challenger` and `champion`, and the history of who passed it."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from linearsr.metric_table import metric_spec
from linearsr_platform.recipe.schema import PromoteSection
from linearsr_platform.registry.models import CHALLENGER, CHAMPION, Evaluation, ModelVersion, aliases_of, find_version, registry_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

HISTORY_PREFIX = "promotion."
"""Registered-model tags that begin with it are rows of the history; what follows is the time, so their order is its order."""


@dataclass(frozen=True, kw_only=True)
class PromotionDecision:
    """What the gate decided and on which numbers."""

    promoted: bool
    """Whether the challenger is the champion now."""
    reason: str
    """One sentence with the numbers."""
    metric: str
    """What was compared, as in `one_step psnr_y`."""
    challenger_value: float | None
    champion_value: float | None
    challenger_version: int
    champion_version: int | None
    """The champion before."""


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """One row of the history."""

    at: str
    """UTC, ISO 8601."""
    by: str
    from_version: int | None
    to_version: int
    metric: str
    challenger_value: float | None
    champion_value: float | None


def promote(
    client: "MlflowClient", name: str, *, rule: PromoteSection, by: str, clock: Callable[[], float] = time.time
) -> PromotionDecision:
    """Make the challenger of a model its champion, or refuse.

    Args:
        client: client of the registry.
        name: of the registered model.
        rule: metric, estimate and tolerance.
        by: who asks; goes into the history.
        clock: seconds since the epoch.

    Raises:
        UserError: if there is no such model, or it has no challenger.
        ValueError: if the rule's metric is unknown.
    """
    challenger = find_version(client, name, CHALLENGER)
    champion = find_version(client, name, CHAMPION) if CHAMPION in aliases_of(client, name) else None
    decision = decide(challenger, champion, rule)
    if decision.promoted and decision.challenger_version != decision.champion_version:
        with registry_errors(f"promoting {name!r} version {challenger.version}"):
            # The row comes first: a champion without a row would be a change that nobody can explain.
            _append_row(client, name, decision, by, clock())
            client.set_registered_model_alias(name, CHAMPION, str(challenger.version))
    return decision


def decide(challenger: ModelVersion, champion: ModelVersion | None, rule: PromoteSection) -> PromotionDecision:
    """Compare two versions by a rule; changes nothing.

    The first version passes, a champion passes against itself, anything that cannot be compared is refused.
    """
    ours = _value(challenger.evaluation, rule)
    theirs = None if champion is None else _value(champion.evaluation, rule)
    promoted, reason = _verdict(challenger, champion, ours, theirs, rule)
    return PromotionDecision(
        promoted=promoted,
        reason=reason,
        metric=f"{rule.estimate} {rule.metric}",
        challenger_value=ours,
        champion_value=theirs,
        challenger_version=challenger.version,
        champion_version=None if champion is None else champion.version,
    )


def history(client: "MlflowClient", name: str) -> tuple[Promotion, ...]:
    """List the promotions of a model, oldest first."""
    with registry_errors(f"reading the history of {name!r}"):
        tags = client.get_registered_model(name).tags
    return tuple(Promotion(**json.loads(tags[key])) for key in sorted(tags) if key.startswith(HISTORY_PREFIX))


def _verdict(
    challenger: ModelVersion, champion: ModelVersion | None, ours: float | None, theirs: float | None, rule: PromoteSection
) -> tuple[bool, str]:
    """Return whether the challenger passes, and why."""
    what = f"{rule.estimate} {rule.metric}"
    if ours is None or not math.isfinite(ours):
        return False, f"challenger version {challenger.version} has {what} {ours}; expected a number; fix: evaluate it again"
    if champion is None:
        return True, f"first champion: version {challenger.version} has {what} {_shown(ours)}{_against_bicubic(challenger, rule)}"
    if champion.version == challenger.version:
        return True, f"version {champion.version} is the champion already, {what} {_shown(ours)}"
    differs = _difference(challenger.evaluation, champion.evaluation)
    if differs or theirs is None or not math.isfinite(theirs):
        why = differs or f"its {what} is {theirs}"
        return False, f"challenger version {challenger.version} cannot be compared with champion version {champion.version}: {why}"
    higher = metric_spec(rule.metric).higher_is_better
    worse_by = theirs - ours if higher else ours - theirs
    numbers = (
        f"{what} ({'higher' if higher else 'lower'} is better): challenger version {challenger.version} has {_shown(ours)}, "
        f"champion version {champion.version} has {_shown(theirs)}"
    )
    if worse_by > rule.tolerance:
        return False, f"{numbers}; worse by {_shown(worse_by)}, and the tolerance is {_shown(rule.tolerance)}"
    if worse_by > 0:
        return True, f"{numbers}; worse by {_shown(worse_by)}, which the tolerance {_shown(rule.tolerance)} allows"
    return True, f"{numbers}; {f'better by {_shown(-worse_by)}' if worse_by else 'equal'}"


def _value(evaluation: Evaluation | None, rule: PromoteSection) -> float | None:
    """Return the number a rule reads; None if it was not measured."""
    return None if evaluation is None else evaluation.rows.get(rule.estimate, {}).get(rule.metric)


def _difference(first: Evaluation | None, second: Evaluation | None) -> str:
    """Say why two evaluations are not comparable; empty if they are."""
    if first is None or second is None:
        return "one has no evaluation"
    if first.test_set != second.test_set:
        return f"test sets differ ({first.test_set} and {second.test_set}); fix: evaluate and register the champion on the same images"
    keys = [key for key in sorted({*first.protocol, *second.protocol}) if first.protocol.get(key) != second.protocol.get(key)]
    if not keys:
        return ""
    pairs = ", ".join(f"{key} {first.protocol.get(key)!r} and {second.protocol.get(key)!r}" for key in keys)
    return f"protocols differ ({pairs}); fix: evaluate and register the champion under the same protocol"


def _against_bicubic(version: ModelVersion, rule: PromoteSection) -> str:
    """Mention bicubic's number beside a first champion's, if it was measured."""
    bicubic = None if version.evaluation is None else version.evaluation.rows.get("bicubic", {}).get(rule.metric)
    return "" if bicubic is None else f", bicubic has {_shown(bicubic)}"


def _shown(value: float) -> str:
    """Write a number with enough digits to tell two metrics apart."""
    return f"{value:.6g}"


def _append_row(client: "MlflowClient", name: str, decision: PromotionDecision, by: str, now_s: float) -> None:
    """Add one row under a tag of its own, so that no row is ever rewritten."""
    at = datetime.fromtimestamp(now_s, UTC)
    row = Promotion(
        at=at.isoformat(),
        by=by,
        from_version=decision.champion_version,
        to_version=decision.challenger_version,
        metric=decision.metric,
        challenger_value=decision.challenger_value,
        champion_value=decision.champion_value,
    )
    client.set_registered_model_tag(name, f"{HISTORY_PREFIX}{at:%Y%m%dT%H%M%S.%f}", json.dumps(asdict(row)))
