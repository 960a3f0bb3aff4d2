"""One local Ray cluster for all tests here, and a task that trains in milliseconds."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).with_name("toy")))


@pytest.fixture(scope="session")
def cluster() -> Iterator[object]:
    """Two CPUs, one a worker."""
    from toy_training import toy_cluster

    with toy_cluster() as config:
        yield config
