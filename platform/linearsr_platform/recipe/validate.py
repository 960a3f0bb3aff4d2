"""Checks merged settings against the schema and its rules, and reports everything that is wrong in plain words."""

import json
import re
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from difflib import get_close_matches
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from linearsr_platform.errors import RecipeProblem
from linearsr_platform.recipe.describe import arms_of, describe, inside, keys_of
from linearsr_platform.recipe.document import KeyPath, dotted
from linearsr_platform.recipe.merge import Merged
from linearsr_platform.recipe.rules import all_rules
from linearsr_platform.recipe.schema import Recipe
from linearsr_platform.recipe.section import Section

_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
_CONFIG_MESSAGE = re.compile(r"^(?:\w+\.)*(?P<key>\w+): got .*; expected (?P<rule>.*)$", re.DOTALL)
_LONGEST_VALUE = 80


def validate(merged: Merged) -> tuple[Recipe, list[RecipeProblem]]:
    """Check merged settings.

    Returns:
        The recipe and all problems; with problems the recipe may lack settings and must not be used.
    """
    try:
        recipe = Recipe.model_validate_json(json.dumps(merged.settings), strict=True)
    except ValidationError as error:
        problems: dict[KeyPath, RecipeProblem] = {}
        invalid: set[KeyPath] = set()
        for detail in error.errors(include_url=False):
            path, problem = _translate(detail, merged)
            # The arms of a union fail one by one at the same key; the first says it all.
            problems.setdefault(path, problem)
            invalid |= {path, *_meant(path)}
        partial = Recipe.model_construct(None, **_valid_settings(Recipe, merged.settings, (), invalid))
        return partial, [*problems.values(), *_broken_rules(partial, merged, invalid)]
    return recipe, list(_broken_rules(recipe, merged, frozenset()))


def _valid_settings(section: type[Section], settings: object, path: KeyPath, invalid: AbstractSet[KeyPath]) -> dict[str, Any]:
    """Return those settings of a section that are fine, so that rules between them are checked along with the rest."""
    values: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        inner: KeyPath = (*path, name)
        kind: Any = field.annotation
        if not isinstance(settings, dict) or name not in settings or inner in invalid:
            continue
        if isinstance(kind, type) and issubclass(kind, Section):
            values[name] = kind.model_construct(None, **_valid_settings(kind, settings[name], inner, invalid))
        elif not any(_around(inner, wrong) for wrong in invalid):
            adapter: TypeAdapter[Any] = TypeAdapter(kind)
            values[name] = adapter.validate_json(json.dumps(settings[name]), strict=True)
    return values


def _broken_rules(recipe: Recipe, merged: Merged, invalid: AbstractSet[KeyPath]) -> Iterator[RecipeProblem]:
    """Yield what every rule finds whose settings are all valid."""
    for rule in all_rules():
        needs = [_parse(key) for key in rule.needs]
        if any(_around(need, wrong) or _around(wrong, need) for need in needs for wrong in invalid):
            continue
        for broken in rule.check(recipe):
            yield _problem(_parse(broken.key), _shown(broken.value), broken.rule, broken.fix, merged)


def _translate(detail: ErrorDetails, merged: Merged) -> tuple[KeyPath, RecipeProblem]:
    """Say one pydantic error in the words of the schema, with the key it is about."""
    location = detail["loc"]
    path, annotation = _locate(location)
    if detail["type"] in _UNKNOWN_KEY:
        section, arm = _locate(location[:-1])
        path = (*section, location[-1])
        return path, _unknown_key(path, keys_of(arm) or {}, merged)
    if detail["type"] == "union_tag_invalid":
        known, wrong = list(arms_of(annotation)), str(detail["ctx"]["tag"])
        key = detail["ctx"]["discriminator"].strip("'")
        path = (*path, key if key.isidentifier() else "preset")
        near = get_close_matches(wrong, known, n=1)
        return path, _problem(path, _shown(wrong), f"one of {', '.join(known)}", f"did you mean {near[0]}?" if near else "", merged)
    value = merged.value(path)
    if detail["type"] == "missing":
        return path, _problem(path, "", f"this is missing; expected {describe(annotation)}", "", merged)
    if detail["type"] == "value_error":
        match = _CONFIG_MESSAGE.match(str(detail.get("ctx", {}).get("error", "")))
        if match is None:
            return path, _problem(path, _shown(value), detail["msg"], "", merged)
        inner = (*path, match["key"])
        return path, _problem(inner, _shown(merged.value(inner)), match["rule"], "", merged)
    rule = describe(annotation)
    whole = isinstance(value, float) and value.is_integer() and rule.startswith("a whole number")
    return path, _problem(path, _shown(value), rule, f"write {value:.0f}" if whole else "", merged)


def _locate(location: KeyPath) -> tuple[KeyPath, object]:
    """Follow an error's location as far as the schema knows it, without the names of union arms, which are no keys."""
    annotation: object = Recipe
    path: KeyPath = ()
    for part in location:
        arm = arms_of(annotation).get(str(part))
        if arm is not None:
            annotation = arm
            continue
        inner = inside(annotation, part)
        if inner is None:
            break
        path, annotation = (*path, part), inner
    return path, annotation


def _unknown_key(path: KeyPath, known: Mapping[str, object], merged: Merged) -> RecipeProblem:
    meant = _nearest(path, known)
    rule = "a known key" if meant else f"a known key ({', '.join(known)})"
    fix = f"did you mean {dotted(meant[0])}?" if meant else "remove it"
    return _problem(path, _shown(merged.value(path)), rule, fix, merged)


def _meant(location: KeyPath) -> list[KeyPath]:
    """Return the nearest valid key beside an unknown one, in a list that is empty if none is near."""
    if not location:
        return []
    path, section = _locate(location[:-1])
    return _nearest((*path, location[-1]), keys_of(section) or {})


def _nearest(path: KeyPath, known: Mapping[str, object]) -> list[KeyPath]:
    return [(*path[:-1], key) for key in get_close_matches(str(path[-1]), known, n=1)]


def _around(outer: KeyPath, inner: KeyPath) -> bool:
    return inner[: len(outer)] == outer


def _parse(key: str) -> KeyPath:
    """Read a dotted key back: `dotted` in reverse."""
    return tuple(int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", key))


def _problem(path: KeyPath, value: str, rule: str, fix: str, merged: Merged) -> RecipeProblem:
    return RecipeProblem(file=merged.origin(path), key=dotted(path), value=value, rule=rule, fix=fix)


def _shown(value: object) -> str:
    """Write a value as YAML would have it, cut when long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
