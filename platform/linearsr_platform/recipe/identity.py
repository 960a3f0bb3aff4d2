"""Identity of JSON values."""

import hashlib
import json


def stable_hash(value: object) -> str:
    """Return the SHA-256 (64 hex digits) of a JSON-able value; it does not depend on the order of keys.

    Raises:
        TypeError: if the value holds something JSON has no word for.
        ValueError: if it holds NaN or infinity.
    """
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
