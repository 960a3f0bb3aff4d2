"""The gate between `challenger` and `champion`: a version passes it, is refused, or comes second; and the way back."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Literal
from uuid import uuid4

from linearsr_platform.errors import UserError
from linearsr_platform.recipe.promote_schema import PromoteSection
from linearsr_platform.registry.gate import Contender, RuleOutcome, judge
from linearsr_platform.registry.history import History, HistoryRow, append, read_history, settle, utc
from linearsr_platform.registry.models import CHALLENGER, CHAMPION, ModelVersion, aliases_of, find_version, read_evaluation

if TYPE_CHECKING:
    from mlflow import MlflowClient

PATIENCE_S = 5.0
"""How long the alias may lag behind the history before it counts as moved by somebody else: a promotion in between needs two calls."""
FRESH_S = 60.0
"""How long it may after a new row: the second call may hang, and MLflow's client tries it again for longer than `PATIENCE_S`."""


@dataclass(frozen=True, kw_only=True)
class PromotionDecision:
    """What came of asking for a promotion, and on which numbers."""

    state: Literal["promoted", "champion already", "refused", "too late", "replaced"]
    """`too late`: every rule held, but another version became champion in between, or before the alias had moved. `replaced`: it was
    champion, is no more, and was not judged again."""
    reason: str
    """One sentence with the numbers."""
    challenger_version: int
    champion_version: int | None
    """The champion before, which the rules compared with."""
    rules: tuple[RuleOutcome, ...] = ()
    forced: bool = False
    """Whether it was promoted although a rule did not hold."""

    @property
    def promoted(self) -> bool:
        """Whether the challenger is the champion now."""
        return self.state in ("promoted", "champion already")


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Time as promotions see it."""

    clock: Callable[[], float] = time.time
    """Seconds since the epoch."""
    sleep: Callable[[float], None] = time.sleep
    patience_s: float = PATIENCE_S


def promote(
    client: "MlflowClient",
    name: str,
    *,
    section: PromoteSection,
    by: str,
    version: int | None = None,
    force_reason: str | None = None,
    waiting: Waiting | None = None,
) -> PromotionDecision:
    """Make a version of a model its champion if every rule holds.

    Args:
        client: client of the registry.
        name: of the registered model.
        section: the rules.
        by: who asks; goes into the history.
        version: which one; the challenger by default.
        force_reason: set promotes also where a rule does not hold, and is kept in the history.
        waiting: clock and patience.

    Raises:
        UserError: if there is no such model or version, or the reason is empty.
        StageError: if MLflow refuses.
    """
    if force_reason is not None and not force_reason.strip():
        raise UserError("--reason: got nothing; expected why the rules do not count this time; fix: --force --reason TEXT")
    waiting = waiting or Waiting()
    challenger = find_version(client, name, CHALLENGER if version is None else version)
    history = _history_as_it_stands(client, name, by, waiting)
    if history.champion == challenger.version:
        return PromotionDecision(
            state="champion already",
            reason=f"version {challenger.version} is the champion already",
            challenger_version=challenger.version,
            champion_version=challenger.version,
        )
    champion = None if history.champion is None else find_version(client, name, history.champion)
    rules = judge(_contender(client, challenger), None if champion is None else _contender(client, champion), section)
    failed = [rule for rule in rules if not rule.passed]
    if failed and force_reason is None:
        return _decision(
            "refused", f"{len(failed)} of {len(rules)} rules failed: {'; '.join(map(told, failed))}", challenger, champion, rules
        )
    row = HistoryRow(
        action="promote",
        at=utc(waiting.clock()),
        by=by,
        from_version=history.champion,
        to_version=challenger.version,
        forced=bool(failed),
        reason=(force_reason or "").strip() if failed else "",
        rules=rules,
        attempt=uuid4().hex,
    )
    late = _write(client, name, row, waiting)
    if late is not None:
        return _decision("too late", late, challenger, champion, rules)
    passed = f"all {len(rules)} rules hold" if not failed else f"forced, {len(failed)} of {len(rules)} rules failed: {row.reason}"
    return _decision("promoted", f"{passed}: {'; '.join(map(told, rules))}", challenger, champion, rules, forced=bool(failed))


def rollback(client: "MlflowClient", name: str, *, by: str, reason: str = "", waiting: Waiting | None = None) -> HistoryRow:
    """Make the previous champion the champion again; doing it twice goes back two.

    Returns: the row in the history.

    Raises:
        UserError: if there was no champion before, its version was deleted, or somebody else was faster.
        StageError: if MLflow refuses.
    """
    waiting = waiting or Waiting()
    history = _history_as_it_stands(client, name, by, waiting)
    before = history.champions[-2] if len(history.champions) > 1 else None
    if before is None:
        known = "there was never a champion" if history.champion is None else f"version {history.champion} is the first"
        raise UserError(
            f"rollback: got {name!r}; expected a model with a champion before the present one, and {known}; fix: promote another"
        )
    find_version(client, name, before)
    row = HistoryRow(
        action="rollback",
        at=utc(waiting.clock()),
        by=by,
        from_version=history.champion,
        to_version=before,
        reason=reason.strip(),
        attempt=uuid4().hex,
    )
    late = _write(client, name, row, waiting)
    if late is not None:
        raise UserError(f"rollback: {late}; fix: look at the history and decide again")
    return row


def champion_of(client: "MlflowClient", name: str) -> ModelVersion | None:
    """Return the version with the alias `champion`, if there is one.

    Raises:
        UserError: if there is no such model.
    """
    return find_version(client, name, CHAMPION) if CHAMPION in aliases_of(client, name) else None


def told(rule: RuleOutcome) -> str:
    """Say an outcome in one phrase with both numbers."""
    numbers = f"{shown(rule.challenger)} against {shown(rule.champion)}" if rule.champion is not None else shown(rule.challenger)
    interval = "" if rule.interval is None else f", difference {rule.difference:+.4g} [{rule.interval[0]:+.4g}, {rule.interval[1]:+.4g}]"
    note = f" ({rule.note})" if rule.note else ""
    return f"{rule.rule}: {numbers}{interval}{note}"


def shown(value: float | str | None) -> str:
    """Write a number of a rule with enough digits to tell two models apart."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.6g}"


def _history_as_it_stands(client: "MlflowClient", name: str, by: str, waiting: Waiting) -> History:
    """Return the history, once the alias agrees with it; where it does not in time, a row says that somebody moved it."""
    started_s = waiting.clock()
    while True:
        alias, history = aliases_of(client, name).get(CHAMPION), read_history(client, name)
        if not history.rows:
            # A champion from before the history is where it begins.
            return History(rows=(), champions=() if alias is None else (alias,))
        if alias == history.champion:
            return history
        now_s = waiting.clock()
        # Nobody waits longer than that: clocks of two machines may differ.
        fresh = now_s - started_s < FRESH_S and now_s - _moved_s(history) < FRESH_S
        if now_s - started_s >= waiting.patience_s and not fresh:
            break
        waiting.sleep(0.2)
    row = HistoryRow(
        action="moved outside", at=utc(waiting.clock()), by=by, from_version=history.champion, to_version=alias, attempt=uuid4().hex
    )
    _write(client, name, row, waiting)
    return read_history(client, name)


def _moved_s(history: History) -> float:
    """Return when the champion last moved, in seconds since the epoch."""
    last = [row for row in history.rows if row.holds][-1]
    return datetime.fromisoformat(last.at).timestamp()


def _write(client: "MlflowClient", name: str, row: HistoryRow, waiting: Waiting) -> str | None:
    """Append a row and, if it holds, move the alias; returns who came in between if the champion is another version in the end."""
    # The row comes first: a champion without a row would be a change that nobody can explain.
    history = append(client, name, row, sleep=waiting.sleep)
    mine = [one for one in history.rows if one.attempt == row.attempt]
    if any(one.holds for one in mine):
        settled = settle(client, name)
        if settled.champion == row.to_version:
            return None
        # Where the alias hung behind the row for long enough, another has taken that for a move from outside.
        last = [one for one in settled.rows if one.holds][-1]
        champion = "no version" if last.to_version is None else f"version {last.to_version}"
        return f"{last.by} made {champion} the champion before the alias had moved ({last.action}, {last.at}), so this holds no longer"
    place = min(one.number for one in mine)
    first = [one for one in history.rows if one.holds and one.number < place][-1]
    return f"{first.by} made version {first.to_version} the champion first ({first.action}, {first.at}), so this came too late"


def _contender(client: "MlflowClient", version: ModelVersion) -> Contender:
    return Contender(version=version, evaluation=read_evaluation(client, version))


def _decision(
    state: Literal["promoted", "refused", "too late"],
    reason: str,
    challenger: ModelVersion,
    champion: ModelVersion | None,
    rules: tuple[RuleOutcome, ...],
    *,
    forced: bool = False,
) -> PromotionDecision:
    return PromotionDecision(
        state=state,
        reason=reason,
        challenger_version=challenger.version,
        champion_version=None if champion is None else champion.version,
        rules=rules,
        forced=forced,
    )
