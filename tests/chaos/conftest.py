"""What an undisturbed training comes to, once for all tests here that disturb one."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed" / "toy"))
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Train the three to their ends; the cluster is gone afterwards, because some tests bring their own."""
    from three_stages import Watch, jobs_of, train
    from toy_training import toy_cluster

    folder = tmp_path_factory.mktemp("undisturbed")
    with toy_cluster() as cluster:
        train(jobs_of(folder, pause_s=0.0), cluster, folder, Watch(lambda watch: None))
    return folder
