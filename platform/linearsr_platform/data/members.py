"""What shards and side files hold beside pictures: JSON objects and arrays, read from bytes that anybody may have written."""

import json
from io import BytesIO
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

ARRAY_MAGIC = b"\x93NUMPY"
"""What an array begins with; numpy would read an archive too. Source: NEP 1."""


def read_object(content: str | bytes) -> dict[str, Any]:
    """Return a JSON object, whose texts can be written to files again.

    Raises:
        ValueError: if the content is no JSON, another kind of value, nested deeper than Python reads, or holds half a character.
    """
    try:
        found = json.loads(content)
    except RecursionError as error:
        raise ValueError("its lists and objects are nested too deep") from error
    if not isinstance(found, dict):
        raise ValueError(f"got {type(found).__name__}; expected a JSON object")  # noqa: TRY004 (told like the others)
    # A program that counts in UTF-16 may have cut an emoji in two; no file takes what is left.
    json.dumps(found, ensure_ascii=False).encode()
    return found


def read_array(content: bytes | memoryview) -> NDArray[np.generic]:
    """Return an array from the bytes of a `.npy` file; nothing in it is executed.

    Raises:
        ValueError: if it is none, cut off, or of objects.
    """
    if content[: len(ARRAY_MAGIC)] != ARRAY_MAGIC:
        raise ValueError("this is no array of numpy")
    try:
        array: NDArray[np.generic] = np.load(BytesIO(content), allow_pickle=False)
    except (EOFError, MemoryError, OverflowError, RecursionError, SyntaxError, TokenError, TypeError) as error:
        raise ValueError(f"this is a broken array: {error}") from error
    return array
