"""The schema in plain words: which keys a section has, and what a setting may be."""

import types
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, Tag
from pydantic.fields import FieldInfo

_WORDS: dict[object, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false", object: "anything"}


def keys_of(annotation: Any) -> dict[str, Any] | None:
    """Return the settings of a section with their types, or None if the type is not a section."""
    bare = _required(_bare(annotation))
    if isinstance(bare, type) and issubclass(bare, BaseModel):
        names: Sequence[str] = list(bare.model_fields)
    elif isinstance(bare, type) and is_dataclass(bare):
        names = [field.name for field in fields(bare)]
    else:
        return None
    hints = get_type_hints(bare, include_extras=True)
    return {name: hints[name] for name in names}


def inside(annotation: Any, part: str | int) -> Any | None:
    """Return the type of a section's key, a mapping's value or a list's entry; None if there is no such thing."""
    keys = keys_of(annotation)
    if keys is not None:
        return keys.get(str(part))
    bare = _required(_bare(annotation))
    arguments = get_args(bare)
    if get_origin(bare) is dict:
        return arguments[1]
    if get_origin(bare) is tuple and isinstance(part, int):
        return arguments[0] if arguments[-1] is Ellipsis else arguments[part] if part < len(arguments) else None
    return None


def arms_of(annotation: Any) -> dict[str, Any]:
    """Return the arms of a union of sections by their tags, which pydantic puts into an error's location; empty for any other type.

    A tag is that of a `Tag`, or the value of the key that tells the sections apart.
    """
    arms = get_args(_bare(annotation))
    marked = {mark.tag: arm for arm in arms for mark in _constraints(arm) if isinstance(mark, Tag)}
    key = next((one.discriminator for one in _constraints(annotation) if isinstance(one, FieldInfo)), None)
    if marked or not isinstance(key, str):
        return marked
    return {value: arm for arm in arms for value in get_args(arm.model_fields[key].annotation)}


def describe(annotation: Any) -> str:
    """Say what a setting may be, as in `a whole number >= 1`."""
    bare, constraints = _bare(annotation), _constraints(annotation)
    for constraint in constraints:
        if isinstance(constraint, FieldInfo) and constraint.description:
            return constraint.description
    limits = [text for constraint in constraints for text in _limits(constraint)]
    return " ".join([_name(bare), " and ".join(limits)]).strip()


def _name(bare: Any) -> str:
    origin, arguments = get_origin(bare), get_args(bare)
    if bare in _WORDS:
        return _WORDS[bare]
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else f"{arguments[0]}"
    if origin in (Union, types.UnionType):
        return ", or ".join("null" if arm is types.NoneType else describe(arm) for arm in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list ({describe(arguments[0])} each)"
    if origin is tuple:
        return f"a list of {len(arguments)} ({describe(arguments[0])} each)"
    return f"a section with keys like {', '.join(list(keys_of(bare) or ('NAME',))[:3])}"


def _limits(constraint: object) -> list[str]:
    if isinstance(constraint, FieldInfo):
        return [text for inner in constraint.metadata for text in _limits(inner)]
    if isinstance(constraint, Ge):
        return [f">= {constraint.ge}"]
    if isinstance(constraint, Gt):
        return [f"> {constraint.gt}"]
    if isinstance(constraint, Le):
        return [f"<= {constraint.le}"]
    if isinstance(constraint, Lt):
        return [f"< {constraint.lt}"]
    if isinstance(constraint, MinLen):
        return [f"with at least {constraint.min_length} in it"]
    return []


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _constraints(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()


def _required(bare: Any) -> Any:
    """Drop `None` from an optional type; a union of several others stays one."""
    if get_origin(bare) not in (Union, types.UnionType):
        return bare
    arms = [arm for arm in get_args(bare) if arm is not types.NoneType]
    return _bare(arms[0]) if len(arms) == 1 else bare
