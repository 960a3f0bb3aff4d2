"""What is in a complete checkpoint, to be compared with another: hashes of each kind of numbers, and whole tensors."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from linearsr_platform import storage
from linearsr_platform.errors import StageError
from linearsr_platform.train.checkpoint_store import Found, find, names_in, weights_file


def newest_checkpoint(url: str) -> Found:
    """Return the newest complete checkpoint in a folder of them.

    Raises:
        StageError: if there is none.
    """
    found = next((found for name in names_in(url) if (found := find(url, name)) is not None and found.damage is None), None)
    if found is None:
        raise StageError(f"{url}: got no complete checkpoint; expected one; fix: look at what the trainers said")
    return found


def digests(found: Found) -> dict[str, str]:
    """Return the sha256 of each kind of numbers in a checkpoint: bits, and how they are shared out over workers.

    Returns:
        By kind: `weight`, `average`, `exp_avg`, `exp_avg_sq`, `generator`, and `buffer` and `frozen` where there are any.
    """
    hashes: dict[str, Any] = {}
    for worker, key, tensor in _tensors(found):
        hashing = hashes.setdefault(key.partition("/")[0], hashlib.sha256())
        run = found.records[worker]["runs"].get(key)
        hashing.update(f"{worker} {key} {tensor.dtype} {run}\n".encode())
        hashing.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return {kind: hashing.hexdigest() for kind, hashing in hashes.items()}


def whole(found: Found, kind: str) -> dict[str, Tensor]:
    """Return all parameters of a kind, each put together from what the workers wrote and flattened, by name."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for worker, key, tensor in _tensors(found):
        if key.startswith(f"{kind}/"):
            parts.setdefault(key.removeprefix(f"{kind}/"), []).append((found.records[worker]["runs"][key]["start"], tensor))
    return {name: torch.cat([tensor for _, tensor in sorted(runs, key=lambda run: run[0])]) for name, runs in sorted(parts.items())}


def _tensors(found: Found) -> Iterator[tuple[int, str, Tensor]]:
    """Yield worker, key and flat tensor, in order."""
    for worker in range(len(found.records)):
        with storage.local_path(weights_file(found.url, worker)) as path, safe_open(path, framework="pt") as file:
            for key in sorted(file.keys()):
                yield worker, key, file.get_tensor(key)
