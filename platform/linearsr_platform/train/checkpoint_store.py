"""Where a job's checkpoints are: one folder each, named by step, complete once every worker's record is in it.

Only worker 0 lists and deletes. `step_00000100/rank_0.safetensors` is followed by `rank_0.json`, the worker's record, which is
written last; a checkpoint is complete when the records of all its workers are there, and nothing else says so.
"""

import re
from dataclasses import dataclass
from typing import Any

from linearsr_platform import storage
from linearsr_platform.errors import UserError

PREFIX = "step_"
NAME = re.compile(rf"{PREFIX}[0-9]+(?:-[0-9]+)?")
"""Folders of other names, such as somebody's copy of a checkpoint, are none and stay where they are."""
KEYS = frozenset({"workers", "attempt", "codec", "optimizer_step", "batches", "loop", "runs", "bytes", "hash"})
"""What every record must have."""


@dataclass(frozen=True, slots=True)
class Found:
    """A complete checkpoint."""

    name: str
    url: str
    records: tuple[dict[str, Any], ...]
    """Of every worker that wrote it."""
    damage: str | None = None
    """Why its records cannot be read; there are none then."""


def checkpoint_name(step: int, trips: int) -> str:
    """Return the name of a checkpoint: its step, and how often the guard had tripped, because after a rollback a step comes again."""
    return f"{PREFIX}{step:08d}" + (f"-{trips}" if trips else "")


def parse_checkpoint_name(name: str) -> tuple[int, int]:
    """Return step and trips from what `checkpoint_name` made."""
    step, _, trips = name.removeprefix(PREFIX).partition("-")
    return int(step), int(trips or 0)


def weights_file(url: str, worker: int) -> str:
    """Return the URL of a worker's numbers in the checkpoint at `url`."""
    return storage.join(url, f"rank_{worker}.safetensors")


def record_file(url: str, worker: int) -> str:
    """Return the URL of a worker's record in the checkpoint at `url`."""
    return storage.join(url, f"rank_{worker}.json")


def names_in(url: str) -> list[str]:
    """Return the names of all checkpoints in a folder, complete or not, newest first: those after a rollback before those it undid."""
    names = [storage.name_of(folder) for folder in storage.list_folders(url)]
    return sorted(filter(NAME.fullmatch, names), key=lambda name: parse_checkpoint_name(name)[::-1], reverse=True)


def find(url: str, name: str) -> Found | None:
    """Read the records of a checkpoint in a folder of them; None if it is not complete."""
    folder = storage.join(url, name)
    records: list[dict[str, Any]] = []
    workers = 1
    while len(records) < workers:
        file = record_file(folder, len(records))
        if not storage.exists(file):
            return None
        try:
            record = storage.read_json(file)
        except UserError:
            return Found(name, folder, (), f"{storage.name_of(file)} is not JSON")
        if not isinstance(record, dict) or not record.keys() >= KEYS or not isinstance(record["workers"], int):
            return Found(name, folder, (), f"{storage.name_of(file)} is no record of a worker")
        records.append(record)
        workers = record["workers"]
    if any(record["attempt"] != records[0]["attempt"] for record in records):
        # Of a worker that was thought dead and wrote on.
        return None
    return Found(name, folder, tuple(records))
