"""The gate's rules, each on both versions' numbers. Decides and changes nothing."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from linearsr.metric_table import METRICS
from linearsr_platform.recipe.promote_schema import (
    SEAMS_AND_COLOUR,
    BetterRule,
    KneeFoundRule,
    NoRegressionRule,
    NotWorseRule,
    PromoteSection,
    SameProtocolRule,
)
from linearsr_platform.registry.evaluation import Evaluation, ProtocolTable
from linearsr_platform.registry.models import EXPERTS_TAG, ModelVersion
from linearsr_platform.registry.paired import PairedDifference, paired_difference

SHOWN_CONFIDENCE = 0.95
"""Confidence of the interval beside a rule that asks for none."""


@dataclass(frozen=True, kw_only=True)
class RuleOutcome:
    """What one rule came to; a rule on several metrics gives one outcome for each."""

    rule: str
    """Kind and subject, as in `better musiq (routed, classic)`."""
    asks: str
    """What must hold, in words."""
    challenger: float | str | None
    champion: float | str | None
    """Both numbers, or what else was compared; None where there is none."""
    difference: float | None = None
    """Challenger minus champion."""
    interval: tuple[float, float] | None = None
    """Of the difference, by a paired bootstrap over images."""
    images: int = 0
    """Number of images in the interval."""
    passed: bool
    note: str = ""
    """Why, where the numbers do not say it."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "RuleOutcome":
        """Read what `dataclasses.asdict` makes of it once it has been JSON."""
        interval = value["interval"]
        return cls(**{**value, "interval": None if interval is None else (interval[0], interval[1])})


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A version with its evaluation, values per image included where there are any."""

    version: ModelVersion
    evaluation: Evaluation | None


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """What a comparing rule reads: a row of one table of both."""

    ours: ProtocolTable
    theirs: ProtocolTable | None
    estimate: str
    protocol: str


def judge(challenger: Contender, champion: Contender | None, section: PromoteSection) -> tuple[RuleOutcome, ...]:
    """Apply every rule of a gate.

    Args:
        challenger: the version that wants to be champion.
        champion: the present one; None before the first, which passes every rule that compares.
        section: the rules, with the bootstrap's seed and resamples.
    """
    judges: dict[type, Callable[..., Iterator[RuleOutcome]]] = {
        BetterRule: _better,
        NotWorseRule: _not_worse,
        NoRegressionRule: _no_regression,
        KneeFoundRule: _knee_found,
        SameProtocolRule: _same_protocol,
    }
    return tuple(outcome for rule in section.rules for outcome in judges[type(rule)](rule, challenger, champion, section))


def lower_is_better(metric: str) -> bool | None:
    """Tell the orientation of a metric; None for one that nothing is known about."""
    if metric in METRICS:
        return not METRICS[metric].higher_is_better
    return True if metric in SEAMS_AND_COLOUR else None


def _of_the_set(metric: str) -> bool:
    return metric in METRICS and METRICS[metric].scope == "set"


def why_not_comparable(ours: ProtocolTable, theirs: ProtocolTable) -> str:
    """Say why two tables are not comparable; empty if they are."""
    if ours.test_set != theirs.test_set:
        return f"test sets differ, {ours.test_set[:12]} and {theirs.test_set[:12]}; fix: evaluate both on the same images"
    mine, other = _how(ours, theirs), _how(theirs, ours)
    keys = sorted(key for key in {*mine, *other} if mine.get(key) != other.get(key))
    pairs = ", ".join(f"{key} {mine.get(key)!r} and {other.get(key)!r}" for key in keys)
    return f"protocols differ: {pairs}; fix: evaluate both under the same" if keys else ""


def _how(table: ProtocolTable, beside: ProtocolTable) -> dict[str, object]:
    """Return a table's protocol, with the weights of those metrics alone that both have: one that is measured less differs in nothing."""
    weights, others = table.protocol.get("weights"), beside.protocol.get("weights")
    if not isinstance(weights, dict) or not isinstance(others, dict):
        return dict(table.protocol)
    return {**table.protocol, "weights": {metric: digest for metric, digest in weights.items() if metric in others}}


def difference_of(
    ours: ProtocolTable, theirs: ProtocolTable, row: str, metric: str, *, confidence: float, section: PromoteSection
) -> PairedDifference | str:
    """Compare a metric of one row image by image, or say why that cannot be done."""
    if _of_the_set(metric):
        return "a value of the whole set, without an interval"
    values = [table.values.get(row, {}).get(metric, {}) for table in (ours, theirs)]
    if not all(values):
        return "no values per image; fix: evaluate and register it again"
    try:
        return paired_difference(*values, confidence=confidence, seed=section.seed, resamples=section.resamples)
    except ValueError as error:
        return str(error)


def _better(rule: BetterRule, challenger: Contender, champion: Contender | None, section: PromoteSection) -> Iterator[RuleOutcome]:
    asks = f"{100 * rule.confidence:g} % interval of the gain above {rule.at_least:g}"
    yield _compare("better", rule, rule.metric, asks, challenger, champion, section, _gained(rule), rule.confidence)


def _gained(rule: BetterRule) -> Callable[[float, tuple[float, float] | None], bool]:
    return lambda gain, interval: interval is not None and interval[0] > 0 and interval[0] >= rule.at_least


def _not_worse(rule: NotWorseRule, challenger: Contender, champion: Contender | None, section: PromoteSection) -> Iterator[RuleOutcome]:
    asks = f"{'mean' if rule.confidence is None else f'{100 * rule.confidence:g} % interval'} at most {rule.by:g} worse"

    def holds(gain: float, interval: tuple[float, float] | None) -> bool:
        if rule.confidence is None:
            return gain >= -rule.by
        return interval is not None and interval[0] >= -rule.by

    for metric in _metrics(rule, challenger, champion):
        yield _compare("not_worse", rule, metric, asks, challenger, champion, section, holds, rule.confidence)


def _no_regression(
    rule: NoRegressionRule, challenger: Contender, champion: Contender | None, section: PromoteSection
) -> Iterator[RuleOutcome]:
    for metric in rule.of:
        asks = f"mean at most {rule.by:g} worse"
        yield _compare("no_regression", rule, metric, asks, challenger, champion, section, lambda gain, interval: gain >= -rule.by, None)


def _metrics(rule: NotWorseRule, challenger: Contender, champion: Contender | None) -> tuple[str, ...]:
    """Return the metrics of a rule; `all` are those of the champion, so that one that is no longer measured is missed."""
    if rule.metrics != "all":
        return rule.metrics
    table = _table((champion or challenger).evaluation, rule.protocol)
    found = {} if isinstance(table, str) else table[1].rows.get(rule.estimate, {})
    return tuple(metric for metric in found if lower_is_better(metric) is not None) or ("all",)


def _compare(
    kind: str,
    rule: BetterRule | NotWorseRule | NoRegressionRule,
    metric: str,
    asks: str,
    challenger: Contender,
    champion: Contender | None,
    section: PromoteSection,
    holds: Callable[[float, tuple[float, float] | None], bool],
    confidence: float | None,
) -> RuleOutcome:
    """Compare one metric of both; `holds` gets the gain, positive is better, and its interval."""
    asks += ", lower is better" if lower_is_better(metric) else ""
    subject = _subject(rule, challenger, champion)
    if isinstance(subject, str):
        return RuleOutcome(rule=f"{kind} {metric}", asks=asks, challenger=None, champion=None, passed=False, note=subject)
    name = f"{kind} {metric} ({rule.estimate}, {subject.protocol})"
    ours = subject.ours.rows.get(rule.estimate, {}).get(metric)
    theirs = None if subject.theirs is None else subject.theirs.rows.get(rule.estimate, {}).get(metric)

    def outcome(passed: bool, note: str) -> RuleOutcome:
        return RuleOutcome(rule=name, asks=asks, challenger=_told(ours), champion=_told(theirs), passed=passed, note=note)

    if ours is None or not isfinite(ours):
        return outcome(False, "the challenger's was not measured; fix: evaluate it again")
    if subject.theirs is None:
        return outcome(True, "no champion yet")
    if theirs is None or not isfinite(theirs):
        return outcome(False, "the champion's was not measured; fix: evaluate it again")
    paired = difference_of(subject.ours, subject.theirs, rule.estimate, metric, confidence=confidence or SHOWN_CONFIDENCE, section=section)
    sign = -1.0 if lower_is_better(metric) else 1.0
    if isinstance(paired, str):
        # Means of the same images can be compared without their values, and so can values of the whole set, which has none for an image.
        kept = not _of_the_set(metric) and bool(subject.ours.values) and bool(subject.theirs.values)
        passed = confidence is None and not kept and holds(sign * (ours - theirs), None)
        return RuleOutcome(rule=name, asks=asks, challenger=ours, champion=theirs, difference=ours - theirs, passed=passed, note=paired)
    gain_interval = (paired.low, paired.high) if sign > 0 else (-paired.high, -paired.low)
    return RuleOutcome(
        rule=name,
        asks=asks,
        challenger=ours,
        champion=theirs,
        difference=ours - theirs,
        interval=(paired.low, paired.high),
        images=paired.images,
        passed=holds(sign * (ours - theirs), gain_interval),
        note=f"weak: {paired.images} images" if paired.weak else "",
    )


def _told(value: float | None) -> float | str | None:
    """Return a number that is not finite as a word: JSON has none for it."""
    return value if value is None or isfinite(value) else str(value)


def _subject(rule: BetterRule | NotWorseRule | NoRegressionRule, challenger: Contender, champion: Contender | None) -> _Subject | str:
    """Find the tables a rule compares, or say why it cannot."""
    ours = _table(challenger.evaluation, rule.protocol)
    if isinstance(ours, str):
        return f"the challenger {ours}"
    name, table = ours
    if champion is None:
        return _Subject(ours=table, theirs=None, estimate=rule.estimate, protocol=name)
    theirs = _table(champion.evaluation, name)
    if isinstance(theirs, str):
        return f"the champion {theirs}"
    odd = why_not_comparable(table, theirs[1])
    return odd or _Subject(ours=table, theirs=theirs[1], estimate=rule.estimate, protocol=name)


def _table(evaluation: Evaluation | None, protocol: str | None) -> tuple[str, ProtocolTable] | str:
    """Return a table with its name, or say what is missing."""
    tables = {} if evaluation is None else evaluation.tables
    if not tables:
        return "has no evaluation; fix: evaluate it"
    if protocol is None and len(tables) > 1:
        return f"was measured under {', '.join(sorted(tables))}; fix: name one as the rule's protocol"
    name = protocol or next(iter(tables))
    if name not in tables:
        return f"was measured under {', '.join(sorted(tables))}, not {name}; fix: evaluate it under that"
    return name, tables[name]


def _knee_found(_: KneeFoundRule, challenger: Contender, champion: Contender | None, section: PromoteSection) -> Iterator[RuleOutcome]:
    found, missing = knees_of(challenger.version)
    theirs = None if champion is None else knees_of(champion.version)
    yield RuleOutcome(
        rule="knee_found",
        asks="a confirmed knee in every expert",
        challenger=f"{found} of {found + len(missing)}",
        champion=None if theirs is None else f"{theirs[0]} of {theirs[0] + len(theirs[1])}",
        passed=found > 0 and not missing,
        note="; ".join(missing) or ("" if found else "not recorded"),
    )


def knees_of(version: ModelVersion) -> tuple[int, list[str]]:
    """Count the experts of a version with a confirmed knee, and say of the others why not."""
    experts = json.loads(version.tags.get(EXPERTS_TAG, "[]"))
    missing = []
    for expert in experts:
        knees = expert.get("knees") or {}
        absent = [stage for stage, knee in knees.items() if not knee["confirmed"]]
        if not knees:
            missing.append(f"{expert['name']}: not recorded")
        elif absent:
            missing.append(f"{expert['name']}: none in {', '.join(absent)}")
    return len(experts) - len(missing), missing


def _same_protocol(
    _: SameProtocolRule, challenger: Contender, champion: Contender | None, section: PromoteSection
) -> Iterator[RuleOutcome]:
    ours = {} if challenger.evaluation is None else challenger.evaluation.tables
    theirs = {} if champion is None or champion.evaluation is None else champion.evaluation.tables
    odd = [f"{name}: not measured" for name in sorted(theirs.keys() - ours.keys())]
    odd += [f"{name}: {why}" for name in sorted(theirs.keys() & ours.keys()) if (why := why_not_comparable(ours[name], theirs[name]))]
    if champion is not None and not theirs:
        odd.append("the champion has no evaluation; fix: evaluate it")
    if not ours:
        odd.append("the challenger has no evaluation; fix: evaluate it")
    yield RuleOutcome(
        rule="same_protocol",
        asks="the champion's protocols and images",
        challenger=", ".join(sorted(ours)) or None,
        champion=None if champion is None else ", ".join(sorted(theirs)) or None,
        passed=not odd,
        note="; ".join(odd) or ("no champion yet" if champion is None else ""),
    )
