"""What MLflow accepts: nested settings as flat parameters of bounded length, and finite numbers."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass

MAX_PARAM_CHARS = 500
"""Longer values are cut: every MLflow store takes 500, and the whole recipe is logged as a file anyway."""
MAX_KEY_CHARS = 250


def flatten(settings: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Turn nested settings into `a.b.c` -> text, with keys and values MLflow takes.

    Args:
        settings: nested mappings or dataclasses; sequences become JSON; None stays as `None`.
        prefix: dotted key of `settings` itself.
    """
    flat: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        nested = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        if isinstance(nested, Mapping) and nested:
            flat |= flatten(nested, f"{name}.")
        else:
            flat[legal_key(name)] = _shortened(_text(nested))
    return flat


def legal_key(name: str) -> str:
    """Return a name with every character MLflow refuses replaced by `_`, cut to its greatest length."""
    return re.sub(r"[^\w\-./ :]", "_", name)[:MAX_KEY_CHARS]


def finite(values: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Split metrics into those a store can plot and those it cannot (NaN, infinity)."""
    good = {name: float(value) for name, value in values.items() if math.isfinite(value)}
    return good, {name: float(value) for name, value in values.items() if name not in good}


def _text(value: object) -> str:
    """Write a leaf: text as it is, sequences as JSON, the rest as Python shows it."""
    if isinstance(value, (list, tuple)):
        return json.dumps(value, default=str)
    return str(value)


def _shortened(text: str) -> str:
    """Cut a text that is too long, and show that it was cut."""
    return text if len(text) <= MAX_PARAM_CHARS else f"{text[: MAX_PARAM_CHARS - 3]}..."
