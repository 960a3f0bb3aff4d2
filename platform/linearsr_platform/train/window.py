"""The steps between two batches of logged metrics. Values are only waited for when the window is flushed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from linearsr.guard import AttentionReading, StepReading
from linearsr_platform.train.processes import rank, sum_over_workers, world_size
from linearsr_platform.train.results import StepResult


@dataclass(frozen=True, slots=True)
class Flushed:
    """What a window came to; the same on every worker."""

    values: dict[str, float]
    """Means of `loss`, what the task logs, and `grad_norm`; of the attentions, where they were looked at, the extremes."""
    seconds: float
    """Time in the loop as worker 0 sees it."""
    steps: list[StepReading]
    attention: list[AttentionReading]
    """Of all workers, in network order."""
    attention_step: int
    """Step at which the attentions were looked at."""


class MetricWindow:
    """Collects step results and turns them into means over steps and workers."""

    def __init__(self, attentions: Sequence[str]) -> None:
        """Start empty; `attentions` names the layers that results may carry readings of."""
        self._attentions = tuple(attentions)
        self._results: list[StepResult] = []

    def __len__(self) -> int:
        return len(self._results)

    def add(self, result: StepResult) -> None:
        """Add the result of one step."""
        self._results.append(result)

    def flush(self, last_step: int, seconds: float) -> Flushed:
        """Empty the window. Every worker calls it, with at least one step in it; values may be NaN or infinite.

        Args:
            last_step: number of the last step in the window.
            seconds: time in the loop as this worker sees it.
        """
        results, self._results = self._results, []
        count, names = len(results), list(results[0].scalars)
        losses = torch.stack([result.loss for result in results])
        scalars = [torch.stack([result.scalars[name] for result in results]).mean() for name in names]
        screened = [torch.zeros_like(losses[0]) if result.screened is None else result.screened for result in results]
        # One collective and one wait for the device, whatever the task logs.
        means = torch.stack([*losses, *scalars]).double()
        clock = torch.tensor([seconds if rank() == 0 else 0.0], dtype=torch.float64, device=means.device)
        rows = self._own_rows(results, means)
        sums = sum_over_workers(torch.cat([means, torch.stack(screened).double(), clock, rows])).tolist()
        step_losses, logged = [[value / world_size() for value in part] for part in (sums[:count], sums[count : count + len(names)])]
        left_out, (shared_seconds, *flat) = sums[count + len(names) : 2 * count + len(names)], sums[2 * count + len(names) :]
        # Of a step whose gradients overflow DeepSpeed tells a number, of all others a tensor on the device.
        norms = torch.stack([torch.as_tensor(result.grad_norm, dtype=torch.float64, device=means.device) for result in results]).tolist()
        first = last_step - count + 1
        steps = [StepReading(first + i, step_losses[i], norms[i], left_out[i] > 0) for i in range(count)]
        attention = self._readings(flat)
        values = {"loss": sum(step_losses) / count, **dict(zip(names, logged, strict=True)), "grad_norm": sum(norms) / count}
        values |= _summary(attention)
        if any(reading.screened for reading in steps):
            values["screened"] = sum(left_out)
        return Flushed(values, shared_seconds, steps, attention, first)

    def _own_rows(self, results: Sequence[StepResult], like: Tensor) -> Tensor:
        """Return this worker's readings in their place among those of all, so that a sum gathers them."""
        seen = results[0].attention
        if seen is None:
            return like.new_zeros(0)
        rows = like.new_zeros(world_size(), len(self._attentions), 4)
        rows[rank()] = seen
        return rows.flatten()

    def _readings(self, flat: list[float]) -> list[AttentionReading]:
        rows = cast("list[list[list[float]]]", torch.tensor(flat, dtype=torch.float64).view(-1, max(1, len(self._attentions)), 4).tolist())
        return [
            AttentionReading(layer, worker, *row[index]) for index, layer in enumerate(self._attentions) for worker, row in enumerate(rows)
        ]


def _summary(readings: Sequence[AttentionReading]) -> dict[str, float]:
    """Return what is logged of the attentions: the worst of all layers and workers."""
    if not readings:
        return {}
    return {
        "attention_normaliser": min(reading.normaliser for reading in readings),
        "attention_dead": max(reading.dead for reading in readings),
        "attention_input": max(reading.magnitude for reading in readings),
    }
