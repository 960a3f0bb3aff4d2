"""The process environment of commands: what libraries must be told before they are imported."""

import logging
import os
import warnings

PRIVATE = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
"""Nothing is reported to anyone."""
QUIET = {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}


def quiet_libraries(*, verbose: bool) -> None:
    """Switch off telemetry and, unless `verbose`, the chatter of MLflow, DeepSpeed and friends.

    Must run before these libraries are imported: they read the environment once.
    """
    for name, value in {**PRIVATE, **({} if verbose else QUIET)}.items():
        os.environ.setdefault(name, value)
    if verbose:
        return
    for name in ("mlflow", "alembic", "DeepSpeed", "ray", "urllib3", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # That a trial failed is told by the search, with the reason.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")
