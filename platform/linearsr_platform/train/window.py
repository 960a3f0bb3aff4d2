"""The steps between two batches of logged metrics. Values are only waited for when the window is flushed."""

from math import isfinite

import torch

from linearsr_platform.errors import StageError
from linearsr_platform.train.processes import rank, sum_over_workers, world_size
from linearsr_platform.train.protocols import StepResult


class TrainingDiverged(StageError):
    """Loss, gradient or validation stopped being a finite number."""


class MetricWindow:
    """Collects step results and turns them into means over steps and workers."""

    def __init__(self) -> None:
        self._results: list[StepResult] = []

    def __len__(self) -> int:
        return len(self._results)

    def add(self, result: StepResult) -> None:
        """Add the result of one step."""
        self._results.append(result)

    def flush(self, last_step: int, seconds: float) -> tuple[dict[str, float], float]:
        """Empty the window. Every worker calls it, with at least one step in it.

        Args:
            last_step: number of the last step in the window.
            seconds: time in the loop as this worker sees it.

        Returns:
            Means of `loss`, what the task logs, and `grad_norm`; and worker 0's `seconds`. The same on every worker.

        Raises:
            TrainingDiverged: if a loss or gradient norm is not finite; the message names the first such step.
        """
        results, self._results = self._results, []
        names = list(results[0].scalars)
        losses = torch.stack([result.loss for result in results])
        scalars = [torch.stack([result.scalars[name] for result in results]).mean() for name in names]
        # One collective and one wait for the device, whatever the task logs.
        local = torch.stack([*losses, *scalars]).double()
        clock = torch.tensor([seconds if rank() == 0 else 0.0], dtype=torch.float64, device=local.device)
        *sums, shared_seconds = sum_over_workers(torch.cat([local, clock])).tolist()
        means = [value / world_size() for value in sums]
        norms = torch.stack([torch.as_tensor(result.grad_norm, dtype=torch.float64) for result in results]).tolist()
        step_losses = means[: len(results)]
        _require_finite(last_step - len(results), step_losses, norms)
        logged = dict(zip(names, means[len(results) :], strict=True))
        values = {"loss": sum(step_losses) / len(results), **logged, "grad_norm": sum(norms) / len(results)}
        return values, shared_seconds


def _require_finite(done: int, losses: list[float], norms: list[float]) -> None:
    """Raise for the first step after `done` ones whose loss or gradient is not finite; DeepSpeed marks bad norms by -1 or infinity."""
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=done + 1):
        if not isfinite(loss) or not isfinite(norm) or norm < 0:
            raise TrainingDiverged(
                f"train step {step}: got loss {loss:g} and gradient norm {norm:g}; expected finite numbers; fix: lower train.lr"
            )
