"""Validation shared out over the workers, with the same result for any number of them."""

from collections.abc import Sequence
from math import fsum, isfinite
from typing import cast

from linearsr_platform.train.processes import collect, rank, world_size
from linearsr_platform.train.protocols import Batch, Engine

PerBatch = dict[int, dict[str, list[float]]]


def validate(engine: Engine, batches: Sequence[Batch]) -> dict[str, float]:
    """Measure all batches with the present weights and return the mean of each metric over images, on every worker.

    Every worker holds all batches and measures every `world_size`-th. Where that does not come out even, a worker measures
    one for nothing, because ZeRO needs all of them in every forward pass. A mean may be NaN or infinite.
    """
    mine: PerBatch = {}
    for start in range(0, len(batches), world_size()):
        index = start + rank()
        values = engine.validate(batches[index % len(batches)])
        if index < len(batches):
            mine[index] = {name: value.double().tolist() for name, value in values.items()}
    measured: PerBatch = {}
    for share in cast("list[PerBatch]", collect(mine)):
        measured.update(share)
    means = {}
    for name in measured[0]:
        images = [value for index in range(len(batches)) for value in measured[index][name]]
        # Exact summation: the same on every worker, so that all of them stop at the same step.
        # Where one is not finite, `fsum` may refuse opposite infinities, and the plain sum tells enough.
        total = fsum(images) if all(map(isfinite, images)) else sum(images)
        means[name] = total / len(images)
    return means
