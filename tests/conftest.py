"""Shared by all tests: one thread a process, reproducible property tests, which processes run them, where the repository is."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

# Before anything imports torch: test processes share the cores, and sums come out in the same order everywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

# `tests/gpu` runs where torch and pytest are all there is.
if find_spec("hypothesis") is not None:
    from hypothesis import HealthCheck, settings

    # Shared machines make deadlines lie; the same examples on every machine make a failure everybody's.
    settings.register_profile("project", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("project")


SHARED_CLUSTERS = ("tests/chaos/", "tests/distributed/")
"""Folders whose tests share what takes long to start, and so stay in one process each."""
OWN_PROCESSES = (
    "test_data_from_s3",
    "test_deepspeed_engine",
    "test_full_method",
    "test_growing",
    "test_guarded_training",
    "test_jobs",
    "test_mlflow_outage",
    "test_mlflow_server",
    "test_quickstart",
    "test_registry_server",
    "test_s3_storage",
    "test_shard_cache_shared",
    "test_sharded_network",
)
"""Files in those folders that start what they need themselves: whichever process is free takes them."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a process of `pytest -n 2` a file at a time, or a whole folder, in the order of the command line."""
    from xdist.scheduler import LoadScopeScheduling

    class FolderScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            folder = next((folder for folder in SHARED_CLUSTERS if file.startswith(folder)), file)
            return file if Path(file).stem in OWN_PROCESSES else folder

    config.option.loadscopereorder = False
    return FolderScheduling(config, log)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parents[1]
