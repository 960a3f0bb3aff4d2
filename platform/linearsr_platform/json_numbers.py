"""Numbers in JSON, which has no word for NaN and infinity: null stands for them."""

from math import isfinite, nan
from typing import Any


def null_for_nan(value: Any) -> Any:
    """Return a JSON-able value with null in place of every number that is not finite; tuples become lists."""
    if isinstance(value, dict):
        return {key: null_for_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [null_for_nan(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def nan_for_null(value: float | None) -> float:
    """Return a number that was written so."""
    return nan if value is None else float(value)
