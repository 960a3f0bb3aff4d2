"""Shared by all tests: one thread a process, reproducible property tests, where the repository is."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports torch: test processes share the cores, and sums come out in the same order everywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

# Shared machines make deadlines lie; the same examples on every machine make a failure everybody's.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parents[1]
