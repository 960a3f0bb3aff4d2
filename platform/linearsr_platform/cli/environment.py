"""The process environment of commands: what libraries must be told before they are imported."""

import logging
import os
import warnings
from typing import TextIO

import typer

PRIVATE = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
"""Nothing is reported to anyone."""
PATIENT = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that wait for each other sleep. By themselves they spin, and two of them beside other work took 33 to 50 s for 1.4 s of work."""
PAGED = {"THP_MEM_ALLOC_ENABLE": "1"}
"""Torch asks for huge pages for tensors from 2 MB on, as NumPy does by itself. In pages of 4 kB a training step on a CPU took a fifth
longer."""
REPEATED_ONCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
"""The outbox repeats what a server did not answer. A repetition below it would hide for minutes that the server is away, and could
start a run twice."""
QUIET = {
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Of transformers, which has one for every model that it reads from disk.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def quiet_libraries(*, verbose: bool) -> None:
    """Set what libraries read: no telemetry, no spinning threads, huge pages, no repetitions by MLflow and, unless `verbose`, no chatter.

    Must run before these libraries are imported: they read the environment once.
    """
    for name, value in {**PRIVATE, **PATIENT, **PAGED, **REPEATED_ONCE, **({} if verbose else QUIET)}.items():
        os.environ.setdefault(name, value)
    if verbose:
        return
    for name in ("mlflow", "alembic", "DeepSpeed", "ray", "urllib3", "matplotlib", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # That a trial failed is told by the search, with the reason.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")


def prepare_for_models(*, verbose: bool) -> None:
    """Quiet libraries, and tell of a sampler that misses an expert: what every command that runs a model begins with."""
    quiet_libraries(verbose=verbose)
    from linearsr.schedule import UnvisitedExpertWarning

    tell_warnings(UnvisitedExpertWarning)


def tell_warnings(kind: type[Warning]) -> None:
    """From now on print each warning of this kind once, as one line on standard error, whatever was filtered before."""
    told: set[str] = set()  # The filter "once" forgets whenever somebody changes filters, as decoding an image does.

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
    ) -> None:
        text = warnings.formatwarning(message, category, filename, lineno, line).rstrip()
        if issubclass(category, kind):
            text = f"warning: {message}"
        if text not in told:
            typer.echo(text, err=True)
        told.add(text)

    warnings.filterwarnings("always", category=kind)
    warnings.showwarning = show
