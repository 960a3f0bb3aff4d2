"""Checks merged settings against the schema and its rules, and reports everything that is wrong in plain words."""

import json
import re
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from difflib import get_close_matches
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from linearsr_platform.errors import RecipeProblem
from linearsr_platform.recipe.describe import describe, inside, keys_of, tagged
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
    value = merged.value(path)
    if detail["type"] in _UNKNOWN_KEY:
        return (*path, location[-1]), _unknown_key(location, merged)
    if detail["type"] == "union_tag_invalid":
        tag, known = str(detail["ctx"]["tag"]), list(tagged(annotation))
        near = get_close_matches(tag, known, n=1)
        fix = f"did you mean {near[0]}?" if near else ""
        return path, _problem((*path, detail["ctx"]["discriminator"].strip("'")), _shown(tag), f"one of {', '.join(known)}", fix, merged)
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
    """Follow an error's location as far as the schema knows it; pydantic puts names of union arms into it that are no keys."""
    annotation: object = Recipe
    path: KeyPath = ()
    for part in location:
        arm = tagged(annotation).get(str(part))
        inner = inside(annotation, part) if arm is None else arm
        if inner is None:
            return path, annotation
        annotation = inner
        path = path if arm is not None else (*path, part)
    return path, annotation


def _unknown_key(location: KeyPath, merged: Merged) -> RecipeProblem:
    meant = _meant(location)
    path, section = _locate(location[:-1])
    known = keys_of(section) or {}
    rule = "a known key" if meant else f"a known key ({', '.join(known)})"
    fix = f"did you mean {dotted(meant[0])}?" if meant else "remove it"
    key = (*path, location[-1])
    return _problem(key, _shown(merged.value(key)), rule, fix, merged)


def _meant(location: KeyPath) -> list[KeyPath]:
    """Return the nearest valid key beside an unknown one, in a list that is empty if none is near."""
    path, section = _locate(location[:-1])
    known = keys_of(section) if location else None
    near = get_close_matches(str(location[-1]), known, n=1) if known else []
    return [(*path, key) for key in near]


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
