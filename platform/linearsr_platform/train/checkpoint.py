"""A full checkpoint: everything that a resumed run needs to go on as if it had never stopped.

Layout of the folder, in which the shares of all workers come together:
`engine/` DeepSpeed's network and optimizer; `rank_N.safetensors` the average of weights and the state of the noise generator;
`rank_N.json` the loop's own state.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from linearsr.guard import Trip
from linearsr_platform.errors import StageError
from linearsr_platform.train.ema import ExponentialAverage
from linearsr_platform.train.processes import rank, world_size
from linearsr_platform.train.protocols import Engine

GENERATOR = "generator"
AVERAGE = "average.{:05d}"


@dataclass(kw_only=True)
class LoopState:
    """What the loop itself remembers; JSON."""

    step: int = 0
    """Optimizer steps taken."""
    seconds: float = 0.0
    """Wall-clock time in the loop as worker 0 saw it, over all restarts."""
    train_seconds: float = 0.0
    """The part of it spent on steps."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Every validation: `step` and its metrics."""
    batches: dict[str, object] = field(default_factory=dict)
    """This worker's place in the data."""
    trips: list[Trip] = field(default_factory=list)
    """Every trip of the guard so far, those of rolled-back steps too."""


def save_checkpoint(folder: Path, engine: Engine, average: ExponentialAverage, state: LoopState, *, codec: str | None) -> None:
    """Write this worker's share into an empty folder, with the hash of the codec. Every worker calls it."""
    engine.save(folder)
    tensors = {AVERAGE.format(index): tensor.contiguous() for index, tensor in enumerate(average.tensors())}
    save_file({**tensors, GENERATOR: engine.generator.get_state()}, folder / f"rank_{rank()}.safetensors")
    document = {"workers": world_size(), "codec": codec, **asdict(state)}
    (folder / f"rank_{rank()}.json").write_text(json.dumps(document, allow_nan=False), encoding="utf-8")


def load_checkpoint(folder: Path, engine: Engine, average: ExponentialAverage, *, codec: str | None) -> LoopState:
    """Restore engine, average and noise generator from a folder with the shares of all workers, and return the loop's state.

    Raises:
        StageError: if the checkpoint was written by another number of workers, whose shares do not fit, or with another codec
            than that of hash `codec`, whose latents mean something else.
    """
    path = folder / f"rank_{rank()}.json"
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    workers = document.pop("workers", 0)
    if workers != world_size():
        raise StageError(
            f"checkpoint {folder}: got shares of {workers or 'fewer'} workers; expected {world_size()}; "
            f"fix: set train.workers to what wrote it, or delete it to start over"
        )
    # A checkpoint from before codecs were recorded has none; all codecs were embedded then.
    found = document.pop("codec", None)
    if found is not None and found != codec:
        raise StageError(
            f"checkpoint {folder}: got codec {found}; expected {codec}; "
            f"fix: name the codec that wrote it in model.codec, or delete it to start over"
        )
    engine.load(folder)
    tensors = load_file(folder / f"rank_{rank()}.safetensors")
    engine.generator.set_state(tensors.pop(GENERATOR))
    average.restore([tensors[name] for name in sorted(tensors)])
    return _state(document)


def _state(document: dict[str, Any]) -> LoopState:
    """Build the loop's state; a checkpoint from before there was a guard has no trips."""
    return LoopState(**{**document, "trips": [Trip(**trip) for trip in document.get("trips", [])]})
