"""From Ray Train's errors to one sentence about what went wrong in a trainer."""

from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from linearsr_platform.errors import StageError, UserError

FINAL_ERRORS = (UserError, StageError, ValueError, TypeError, ImportError)
"""Errors that would come again after every restart. All others, like a lost connection or a full memory, may not."""
LAST_LINES = 3


class TrainerFailed(StageError):
    """A trainer gave up."""

    def __init__(self, message: str, details: str = "", lost: bool = False) -> None:
        """Keep a sentence for everybody, the worker's traceback for `--verbose`, and whether the process that drives it was lost."""
        super().__init__(message)
        self.details = details
        self.lost = lost

    def __reduce__(self) -> tuple[type["TrainerFailed"], tuple[str, str, bool]]:
        """Travel between processes whole."""
        return TrainerFailed, (str(self), self.details, self.lost)


class StopAtFinalError(UserCallback):
    """Ends a run at an error that a restart cannot help; Ray Train by itself restarts the workers after any error."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the first such error in the controller, which gives up then."""
        for _, error in sorted(worker_exceptions.items()):
            if isinstance(error, FINAL_ERRORS):
                raise error


def explain(name: str, error: TrainingFailedError | RayError) -> TrainerFailed | UserError:
    """Turn what `fit` raised into the error to show.

    Args:
        name: of the job.
        error: from Ray.
    """
    if isinstance(error, ControllerError):
        cause = error.controller_failure
    elif isinstance(error, WorkerGroupError):
        cause = _first_cause(error.worker_failures)
    else:
        cause = error
    details = "\n".join(getattr(cause, "__notes__", [])) or str(error)
    if isinstance(cause, UserError):
        return UserError(f"{name}: {cause}")
    if isinstance(cause, WorkerHealthCheckFailedError):
        return TrainerFailed(f"{name}: a worker died: it was killed, ran out of memory, or its machine was lost", details)
    if isinstance(cause, RayActorError):
        text = "the process that controls it died: it was killed, ran out of memory, or its machine was lost; fix: run it again, it resumes"
        return TrainerFailed(f"{name}: {text}", details, lost=True)
    if isinstance(cause, (StageError, ValueError)):
        return TrainerFailed(f"{name}: {cause}", details)
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return TrainerFailed(f"{name}: {type(cause).__name__}: " + "\n".join(lines[-LAST_LINES:]), details)


def _first_cause(failures: dict[int, Exception]) -> Exception:
    """Choose the failure that brought the others about: those of the other workers are lost connections to it."""
    ordered = [error for _, error in sorted(failures.items())]
    dead = [error for error in ordered if isinstance(error, WorkerHealthCheckFailedError)]
    own = [error for error in ordered if "Connection closed by peer" not in str(error)]
    return [*dead, *own, *ordered][0]
